"""What surrounds every answer of the port, whoever gives it: security headers, closed paths, no crawlers."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from socket import create_connection

import pytest

from tests.patience import PATIENCE_S
from tests.servers import Response, WaveProxy
from wave_proxy.config.handed import ConfigInvalid
from wave_proxy.config.loading import load
from wave_proxy.config.model import SecurityHeaderSettings

HEADERS = {
    "Strict-Transport-Security": "max-age=31536000; includeSubDomains",
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "strict-origin-when-cross-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Content-Security-Policy": "default-src 'self'; style-src 'self' https://fonts.googleapis.com; "
    "font-src https://fonts.gstatic.com; img-src 'self' data:; frame-ancestors 'none'",
}
TOKEN = "0" * 32


def security(answer: Response) -> dict[str, list[str]]:
    """The security headers of an answer."""
    return {name: values for name in HEADERS if (values := answer.headers.get_all(name))}


def test_every_answer_has_the_security_headers(wave: Callable[..., WaveProxy]) -> None:
    proxy = wave(config='[http]\ndeny_paths = ["/health", "/v2/wt/0/a/manifests/1"]\n')
    wanted = {name: [value] for name, value in HEADERS.items()}
    for method, path, status in (
        ("GET", "/service-info", 200),
        ("HEAD", "/service-info", 200),
        ("GET", "/nothing", 404),
        ("PUT", "/service-info", 405),
        ("POST", "/v1alpha2/container", 400),
        ("GET", f"/v1alpha2/container/{TOKEN}", 404),
        ("DELETE", f"/container-token/{TOKEN}", 401),
        ("GET", "/", 400),
        ("GET", "/v2/", 200),
        ("GET", f"/v2/wt/{TOKEN}/a/manifests/1", 404),
        ("PUT", "/v2/docker.io/a/manifests/1", 405),
        ("GET", "/health", 405),
        ("GET", "/health?x=1", 405),
        ("GET", "/%68ealth", 405),
        ("GET", "/v2/wt/0/a/manifests/1", 405),
        ("GET", "*", 400),
    ):
        answer = proxy.request(method, path)
        assert (path, answer.status) == (path, status)
        assert security(answer) == wanted, path
    for path in ("/health/", "/v2/wt/0/a/manifests/2"):
        assert proxy.request("GET", path).status == 404
    page = proxy.request("GET", "/view/inspect")
    assert security(page) == {
        **wanted,
        "Content-Security-Policy": [page.headers["Content-Security-Policy"]],
        "Referrer-Policy": ["same-origin"],
    }
    assert page.headers["Content-Security-Policy"].startswith("default-src 'none'; ")
    _refuse_crawlers(proxy)
    _refuse_what_is_no_request(proxy)
    _answer_without_the_api(proxy)


def _refuse_crawlers(proxy: WaveProxy) -> None:
    for agent in ("Mozilla/5.0 (compatible; Googlebot/2.1)", "AhrefsBot/7.0", "Twitterbot/1.0", "x SLURP y"):
        for path in ("/service-info", "/v2/", "/nothing"):
            refused = proxy.request("GET", path, headers={"User-Agent": agent})
            assert (refused.status, refused.body) == (405, b"")
            assert refused.headers["X-Frame-Options"] == "DENY"
        rules = proxy.request("GET", "/robots.txt", headers={"User-Agent": agent})
        assert (rules.status, rules.body) == (200, b"User-agent: *\nDisallow: /\n")


def _refuse_what_is_no_request(proxy: WaveProxy) -> None:
    with create_connection(("127.0.0.1", proxy.port), timeout=PATIENCE_S) as connection:
        connection.sendall(b"nonsense\r\n\r\n")
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
    assert received.startswith(b"HTTP/1.1 400 ")
    for name, value in HEADERS.items():
        assert f"{name}: {value}\r\n".encode() in received


def _answer_without_the_api(proxy: WaveProxy) -> None:
    os.kill(proxy.api_pid(), signal.SIGSTOP)
    os.kill(proxy.api_pid(), signal.SIGKILL)
    answer = proxy.request("GET", "/service-info")
    while answer.status == 200:  # not dead yet, or there again already
        os.kill(proxy.api_pid(), signal.SIGKILL)
        answer = proxy.request("GET", "/service-info")
    assert (answer.status, list(answer.json())) == (503, ["message"])
    assert security(answer) == {name: [value] for name, value in HEADERS.items()}


def test_headers_are_the_operators(wave: Callable[..., WaveProxy]) -> None:
    config = '[security_headers]\nx_frame_options = ""\ncontent_security_policy = "default-src *"\n'
    proxy = wave(config=f'{config}[pages]\nenabled = false\nlanding_url = "https://site.test/wave"\n')
    for path in ("/service-info", "/v2/"):
        told = security(proxy.request("GET", path))
        assert "X-Frame-Options" not in told
        assert told["Content-Security-Policy"] == ["default-src *"]
    landing = proxy.request("GET", "/")
    assert (landing.status, landing.headers["Location"]) == (301, "https://site.test/wave")
    page = proxy.request("GET", "/view/inspect")
    assert (page.status, page.json()["message"]) == (404, "Not Found")
    assert b"/view/" not in proxy.request("GET", "/openapi").body


def test_headers_can_be_switched_off() -> None:
    assert SecurityHeaderSettings().headers == HEADERS
    assert SecurityHeaderSettings(enabled=False).headers == {}


@pytest.mark.parametrize("value", ["a\\nb", "ü", "\\u0000"])
def test_a_header_is_one_line(tmp_path: Path, value: str) -> None:
    file = tmp_path / "wave.toml"
    file.write_text(f'[security_headers]\nreferrer_policy = "{value}"\n')
    with pytest.raises(ConfigInvalid, match="one line of ASCII"):
        load(file, {})

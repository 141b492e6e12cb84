"""The port as clients reach it: TLS and IPv6, several workers on one port, the api behind it."""

import json
import socket
import ssl
import subprocess
from collections.abc import Callable
from http.client import HTTPSConnection
from pathlib import Path

import pytest

from bench.images import image, layer, random_blob
from bench.upstream import Upstream
from tests.identified import issue
from tests.patience import PATIENCE_S
from tests.servers import WaveProxy, free_port, http_request, pull
from wave_proxy.image.oci import digest_of
from wave_proxy.serve.tls import TlsInvalid, server_context

Wave = Callable[..., WaveProxy]
Registry = Callable[..., Upstream]


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate for localhost and its key."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -keyout {key} -out {cert} -subj /CN=localhost "
        "-addext subjectAltName=DNS:localhost,IP:127.0.0.1".split(),
        check=True,
        capture_output=True,
    )
    return cert, key


def test_what_is_no_certificate_or_not_its_key_is_named(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    cert, key = certificate
    other, text = tmp_path / "other.pem", tmp_path / "text"
    subprocess.run(["openssl", "genrsa", "-out", other, "2048"], check=True, capture_output=True)
    text.write_text("none")
    for files, said in (
        ((text, key), f"tls_cert {text} is no PEM certificate"),
        ((cert, text), f"tls_key {text} is no PEM private key"),
        ((cert, other), f"tls_key {other} is not the key of the first certificate in tls_cert {cert}"),
    ):
        with pytest.raises(TlsInvalid) as caught:
            server_context(*files)
        assert str(caught.value) == said


def test_images_are_pulled_over_tls(
    upstream: Registry, wave: Wave, certificate: tuple[Path, Path], tmp_path: Path
) -> None:
    cert, key = certificate
    original = image([layer({"big.bin": random_blob(5 << 20, seed=3)}, compression="none")])
    registry = upstream()
    registry.add("lib/app", original, "v1")
    proxy = wave(upstreams=[registry.address], args=["--tls-cert", str(cert), "--tls-key", str(key)])
    assert f"ready https://localhost:{proxy.port}" in proxy.stderr
    context = ssl.create_default_context(cafile=str(cert))
    for _ in ("cold", "warm"):
        connection = HTTPSConnection("localhost", proxy.port, context=context, timeout=PATIENCE_S)
        blob = original.blobs[1].digest
        for path, digest in ((f"manifests/{original.digest}", original.digest), (f"blobs/{blob}", blob)):
            connection.request("GET", f"/v2/{registry.address}/lib/app/{path}")
            answer = connection.getresponse()
            assert answer.status == 200
            assert digest_of(answer.read()) == digest
        connection.request("GET", "/service-info")
        assert connection.getresponse().status == 200
        connection.close()


def test_it_listens_on_ipv4_and_ipv6(wave: Wave) -> None:
    if not socket.has_ipv6:
        pytest.skip("this kernel has no IPv6")
    proxy = wave(args=["--host", ""])
    assert http_request(f"127.0.0.1:{proxy.port}", "GET", "/v2/").status == 200
    assert http_request(f"[::1]:{proxy.port}", "GET", "/v2/").status == 200


def test_every_worker_answers_on_the_one_port(wave: Wave) -> None:
    proxy = wave(workers=3, config='[log]\nrequests = "all"\n')
    assert len(proxy.workers()) == 3
    for _ in range(200):
        assert proxy.request("GET", "/v2/").status == 200
        if all(f'"proxy-{number}"' in proxy.stderr for number in range(3)):
            break
    assert all(f'"proxy-{number}"' in proxy.stderr for number in range(3))


def test_neither_tokens_nor_passwords_are_logged(upstream: Registry, wave: Wave) -> None:
    registry = upstream(auth="basic", username="me", password="password-1")
    registry.add("lib/app", image([layer({"a": "b"})]), "v1")
    proxy = wave(
        config=f'[log]\nrequests = "all"\nlevel = "debug"\n[registries."{registry.address}"]\ninsecure = true\n'
        'allow_private = true\nusername = "me"\npassword = "password-1"\n'
    )
    access_token = issue(proxy.redis_url, "ada@example.org")
    answer = proxy.submit(
        containerImage=f"{registry.address}/lib/app:v1", towerAccessToken=access_token, containerConfig={"env": ["A=1"]}
    )
    proxy.pull(answer["targetImage"])
    proxy.request("GET", f"/v1alpha2/container/{answer['requestId']}")
    proxy.request("GET", f"/container-token/{answer['requestId']}?q={answer['requestId']}")
    by_digest = "quay.io/APP:v9@sha256:123"
    for name in ("https://me:password-1@quay.io/x", "me:password-1@quay.io/x", by_digest):
        assert proxy.request("POST", "/v1alpha2/container", body={"containerImage": name}).status == 400
    endpoint = {"towerAccessToken": "x", "towerEndpoint": "https://me:password-1@platform.example/api"}
    assert proxy.request("POST", "/v1alpha1/inspect", body={"containerImage": "x", **endpoint}).status == 400
    assert proxy.stop() == 0
    assert '"request"' in proxy.stderr
    assert proxy.stderr.count("@quay.io/x") == 2
    assert by_digest in proxy.stderr
    secrets = [answer["containerToken"], "password-1", access_token.rpartition("-")[2]]
    assert [secret for secret in secrets if secret in proxy.stderr] == []


def test_registries_are_reached_through_projects_of_one_mirror(upstream: Registry, wave: Wave) -> None:
    """With a token for the project's repository, and another one for each."""
    mirror, images = upstream(auth="bearer", username=""), {}
    hosts = {"docker.io": "hub", "quay.io": "others/quay"}
    tables = ""
    for host, project in hosts.items():
        images[host] = image([layer({"from": host})])
        mirror.add(f"{project}/library/app", images[host], "v1")
        tables += f'[registries."{host}"]\nendpoint = "http://{mirror.address}"\nprefix = "{project}"\n'
    proxy = wave(config=tables)
    for host in hosts:
        assert pull(proxy.address, f"{host}/library/app", "v1").manifest == images[host].manifest
        answer = proxy.submit(containerImage=f"{host}/library/app:v1", containerConfig={"env": ["A=1"]})
        assert f"/wt/{answer['containerToken']}/library/app:v1" in answer["targetImage"]
        assert proxy.pull(answer["targetImage"]).manifest != images[host].manifest


def test_why_a_request_failed_is_logged_and_no_header_of_ours_gets_out(wave: Wave) -> None:
    """Whether the proxy or the api has answered."""
    gone = f"127.0.0.1:{free_port()}"
    proxy = wave(upstreams=[gone])
    asked = {"containerImage": f"{gone}/lib/app:v1", "containerConfig": {"env": ["A=1"]}}
    answers = [
        proxy.request("GET", f"/v2/{gone}/lib/app/manifests/v1"),
        proxy.request("POST", "/v1alpha2/container", body=asked),
    ]
    assert proxy.stop() == 0
    logged = [json.loads(line) for line in proxy.stderr.splitlines() if '"event": "request"' in line]
    logged = [line for line in logged if line["method"] != "HEAD"]  # the api's own look at what is stored here
    assert [line["status"] for line in logged] == [answer.status for answer in answers] == [503, 503]
    for line, answer in zip(logged, answers, strict=True):
        assert line["reason"] in answer.body.decode().replace('\\"', '"')
        assert gone in line["reason"]
        assert line["code"].isupper()
        assert not [name for name in answer.headers if name.lower().startswith("x-wave")]


def test_a_client_cannot_say_which_address_it_has(upstream: Registry, wave: Wave) -> None:
    registry = upstream()
    registry.add("lib/app", image([layer({"a": "b"})]), "v1")
    proxy = wave(upstreams=[registry.address])
    answer = proxy.request(
        "POST",
        "/v1alpha2/container",
        body={"containerImage": f"{registry.address}/lib/app:v1"},
        headers={"X-Wave-Client": "9.9.9.9", "X-Forwarded-For": "8.8.8.8"},
    ).json()
    record = proxy.request("GET", f"/v1alpha2/container/{answer['requestId']}").json()
    assert record["ipAddress"] == "127.0.0.1"

"""Settings as child processes get them: the same, frozen, secret, and without what validates them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from wave_proxy.config.handed import hand_down, receive
from wave_proxy.config.loading import load

CONFIG = """
server_url = "https://wave.test"
redis_url = "redis://:hidden@127.0.0.1:1"
[registries."quay.io"]
username = "robot"
password_file = "{password}"
[registries."docker.io/acme"]
username = "ada"
password = "hidden"
users = ["*@acme.test"]
[accounts]
admin = "sha256:{hash}"
[http]
trusted_proxies = ["10.0.0.0/8"]
[security_headers]
x_frame_options = ""
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "password").write_text("of the file\n")
    file = tmp_path / "wave.toml"
    file.write_text(CONFIG.format(password=tmp_path / "password", hash="0" * 64))
    return file


def members(value: Any) -> Any:
    """All that settings hold, as plain values; secrets told."""
    if hasattr(value, "get_secret_value"):
        return value.get_secret_value()
    if isinstance(value, dict):
        return {key: members(member) for key, member in value.items()}
    return {name: members(member) for name, member in vars(value).items()} if hasattr(value, "__dict__") else value


def test_a_child_gets_what_the_parent_has(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load(config, {})
    monkeypatch.setenv("WAVE_SETTINGS_FD", str(hand_down(settings)))
    handed = receive()
    assert members(handed) == members(settings)
    assert [table.read_password() for table in handed.registries.values()] == ["of the file", "hidden"]
    for name in ("public_url", "authority", "own_url"):
        assert getattr(handed, name) == getattr(settings, name)
    assert handed.security_headers.headers == settings.security_headers.headers
    assert "X-Frame-Options" not in handed.security_headers.headers
    monkeypatch.setenv("WAVE_OWN_URL", "http://127.0.0.1:1")
    assert handed.own_url == settings.own_url == "http://127.0.0.1:1"
    assert "hidden" not in repr(handed.redis_url)
    assert bool(handed.redis_url)
    assert not handed.build.secret
    with pytest.raises(AttributeError, match="frozen"):
        handed.port = 1  # type: ignore[misc]


def test_a_worker_does_without_what_validates(config: Path) -> None:
    fd = hand_down(load(config, {}))
    code = (
        "import sys, wave_proxy.serve.__main__; from wave_proxy.config.handed import receive; "
        "print(receive().http.trusted_proxies, 'pydantic' in sys.modules)"
    )
    environment = {**os.environ, "WAVE_SETTINGS_FD": str(fd)}
    command = [sys.executable, "-c", code]
    said = subprocess.run(command, env=environment, pass_fds=(fd,), capture_output=True, text=True, check=True)
    assert said.stdout == "('10.0.0.0/8',) False\n"

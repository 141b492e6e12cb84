"""What is said of a configuration that can't be used, or that is certainly meant otherwise."""

from pathlib import Path

import pytest

from wave_proxy.config.handed import ConfigInvalid
from wave_proxy.config.loading import load
from wave_proxy.config.mistakes import unknown_variables

LOGIN = '[registries."quay.io"]\nusername = "a"\n'


def refused(tmp_path: Path, text: str) -> str:
    file = tmp_path / "wave.toml"
    file.write_text(text)
    with pytest.raises(ConfigInvalid) as caught:
        load(file, {})
    return str(caught.value).replace(f"{tmp_path}/", "")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prot = 1", "prot: no such key; did you mean port?"),
        ("colour = 1", "colour: no such key"),
        ("[platforms]", "platforms: no such key; did you mean [platform]?"),
        ("[cache]\nmax_byte = 1", "cache.max_byte: no such key; did you mean max_bytes?"),
        ('max_bytes = "5GB"', "max_bytes: no such key; did you mean [cache] max_bytes?"),
        ("[quota]\nport = 1", "quota.port: no such key; did you mean port, before the first [table]?"),
        (f'{LOGIN}pasword = "b"', "registries.quay.io.pasword: no such key; did you mean password?"),
    ],
)
def test_an_unknown_key_and_what_may_be_meant(tmp_path: Path, text: str, said: str) -> None:
    assert refused(tmp_path, text).split("; registries.quay.io: ")[0] == said


@pytest.mark.parametrize("host", ["quay.io", "registry.cluster.example.org"])
def test_a_host_without_its_quotes(tmp_path: Path, host: str) -> None:
    said = refused(tmp_path, f'[registries.{host}]\nusername = "a"\npassword = "b"\n')
    assert said == f'[registries.{host}]: the host needs quotes: [registries."{host}"]'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cache = 5", "cache: expected a table (it is 5)"),
        ("registries = 5", "registries: expected a table (it is 5)"),
        ('[registries]\n"quay.io" = 5', "registries.quay.io: expected a table (it is 5)"),
        ('[http]\ndeny_paths = "/x"', "http.deny_paths: expected a list (it is '/x')"),
        ('[access]\nanonymous = "nope"', "access.anonymous: expected true or false (it is 'nope')"),
    ],
)
def test_another_type(tmp_path: Path, text: str, said: str) -> None:
    assert refused(tmp_path, text) == said


@pytest.mark.parametrize(
    ("text", "is_hinted"),
    [
        ("server_url = http://a", True),
        ("[quota]\nwait = 10s", True),
        ('server_url = "http://a', False),
        ("[quota", False),
        ("port = ", False),
    ],
)
def test_what_is_no_toml(tmp_path: Path, text: str, is_hinted: bool) -> None:
    said = refused(tmp_path, text)
    assert said.startswith("wave.toml: ")
    assert "(at " in said
    assert said.endswith(": texts, durations and sizes are written in quotes") == is_hinted


def test_what_is_no_text_at_all(tmp_path: Path) -> None:
    file = tmp_path / "wave.toml"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigInvalid, match=r"wave\.toml: .*utf-8"):
        load(file, {})


@pytest.mark.parametrize("name", ["WAVE_REGISTRIES", "WAVE_HTTP__DENY_PATHS"])
def test_a_variable_that_is_no_json(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "/secret")
    with pytest.raises(ConfigInvalid) as caught:
        load(None, {})
    assert str(caught.value) == f"{name}: the value is not valid JSON, in which tables and lists are given"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f'{LOGIN}password = "b"\npassword_file = "/etc/hostname"', "password and password_file are both set"),
        (f'{LOGIN}password = "b"\nusers = []', "users is empty, which would open the login to everybody"),
        ('data = ""', "data: expected a folder"),
        ("[cache]\nmax_bytes = 50", 'cache.max_bytes: expected at least "1MB"'),
        ("[build]\nmemory = 4", 'build.memory: expected at least "1MB"'),
        ('[build]\nengine = "buildkit"', 'build: engine = "buildkit" needs buildkit_address'),
        ('tls_cert = "/etc/hostname"', "TLS needs both tls_cert and tls_key: tls_key is not set"),
    ],
)
def test_what_is_certainly_a_mistake(tmp_path: Path, text: str, said: str) -> None:
    assert said in refused(tmp_path, text)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("WAVE_PROT", "; did you mean WAVE_PORT?"),
        ("WAVE_CACHE_MAX_BYTES", "; did you mean WAVE_CACHE__MAX_BYTES?"),
        ("wave_prot", "; did you mean WAVE_PORT?"),
        ("WAVE_XYZZY", ""),
    ],
)
def test_a_variable_that_is_no_setting(name: str, said: str) -> None:
    assert unknown_variables([name]) == [f"{name}: no such setting{said}"]


def test_variables_that_are_none_of_these() -> None:
    ours = ["WAVE_PORT", "wave_cache__max_bytes", "WAVE_CONFIG_FILE", "WAVE_SETTINGS_FD", "WAVE_REGISTRIES"]
    clients = ["WAVE_ENDPOINT", "WAVE_API_ENDPOINT", "PATH", "HEATWAVE_PORT", "WAVE_ACCOUNTS__ADMIN"]
    assert unknown_variables([*ours, *clients]) == []

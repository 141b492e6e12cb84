"""What is said of a configuration that can't be used, or that is certainly meant otherwise."""

import subprocess
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
        ("port = 9090\nport = 9091", False),
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
        (
            '[build]\nallow_private = ["conda.cluster"]',
            "build.allow_private.0: expected host:port (it is 'conda.cluster')",
        ),
        ('[build]\nallow_private = ["[::1]"]', "build.allow_private.0: expected host:port"),
        ('[build]\nproxy = "proxy.cluster:3128"', "build.proxy: expected http://host:port or https://host:port"),
        ('[registries."docker.io"]\nprefix = "/hub"', "registries.docker.io.prefix: expected the beginning of"),
        ('[build]\nengine = "kubernetes"', "build.engine: Input should be 'buildah', 'buildkit' or 'none'"),
        ('[build]\nrepository = "Foo Bar"', "build.repository: expected a repository without a tag"),
        ('[build]\nrepository = "quay.io"', "build.repository: expected a repository without a tag"),
        ('[build]\ncache_repository = "quay.io/acme/cache:1"', "build.cache_repository: expected a repository"),
        ('[build]\nsecret = "short"', "build.secret: expected at least 32 characters"),
        ("metrics_port = 9090", "metrics_port: metrics need a port of their own"),
        ('[quota]\npull_anonymous = "0/1h"', 'quota.pull_anonymous: expected "<max>/<duration>" with 1 to'),
        ('[http]\ndeny_paths = ["v1alpha1/inspect"]', "http.deny_paths.0: expected a path that begins with a slash"),
        (
            '[registries."quay.io"]\nca_file = "/etc/hostname"',
            "registries.quay.io.ca_file: expected a file of certificates in PEM (it is '/etc/hostname')",
        ),
    ],
)
def test_what_is_certainly_a_mistake(tmp_path: Path, text: str, said: str) -> None:
    assert said in refused(tmp_path, text)


def test_a_wrong_secret_stays_out_of_the_message(tmp_path: Path) -> None:
    assert "hunter2" not in refused(tmp_path, '[build]\nsecret = "hunter2"')


def test_plain_http_and_certificates_exclude_each_other(tmp_path: Path) -> None:
    certificate = tmp_path / "ca.pem"
    request = (
        f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=ca -keyout {tmp_path}/key -out {certificate}"
    )
    subprocess.run(request.split(), check=True, capture_output=True)
    said = refused(tmp_path, f'[registries."quay.io"]\ninsecure = true\nca_file = "{certificate}"')
    assert said.startswith("registries.quay.io: insecure means plain http")


@pytest.mark.parametrize("host", ["index.docker.io", "registry-1.docker.io", "Docker.io"])
@pytest.mark.parametrize("prefix", ["", "/acme"])
def test_another_name_of_docker_hub(tmp_path: Path, host: str, prefix: str) -> None:
    said = refused(tmp_path, f'[registries."{host}{prefix}"]\nusername = "a"\npassword = "b"')
    assert said.endswith(f'did you mean [registries."docker.io{prefix}"]?')


@pytest.mark.parametrize("text", ["conda.cluster:80", "[::1]:8080", "127.0.0.1:1"])
def test_what_builds_may_reach(tmp_path: Path, text: str) -> None:
    file = tmp_path / "wave.toml"
    file.write_text(f'[build]\nallow_private = ["{text}"]')
    assert load(file, {}).build.allow_private == (text,)


@pytest.mark.parametrize("text", ["", "wave/images", "registry.cluster:5000/wave", "quay.io/acme/a-b"])
def test_where_builds_may_go(tmp_path: Path, text: str) -> None:
    file = tmp_path / "wave.toml"
    file.write_text(f'[build]\nrepository = "{text}"')
    assert load(file, {}).build.repository == text


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("WAVE_PORT", "abc", "WAVE_PORT: Input should be a valid integer"),
        ("wave_port", "abc", "wave_port: Input should be a valid integer"),
        (
            "WAVE_QUOTA__PULL_ANONYMUS",
            "1/1h",
            "WAVE_QUOTA__PULL_ANONYMUS: no such setting; did you mean WAVE_QUOTA__PULL_ANONYMOUS?",
        ),
        ("WAVE_QUOTA__WAIT", "soon", "WAVE_QUOTA__WAIT: expected a duration"),
        (
            "WAVE_REGISTRIES",
            '{"quay.io": {"prxy": ""}}',
            "WAVE_REGISTRIES.quay.io.prxy: no such key; did you mean proxy?",
        ),
    ],
)
def test_a_variable_is_named_as_such(monkeypatch: pytest.MonkeyPatch, name: str, text: str, said: str) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(ConfigInvalid) as caught:
        load(None, {})
    assert str(caught.value).startswith(said)


def test_a_flag_is_not_blamed_on_the_variable_that_it_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WAVE_PORT", "9090")
    with pytest.raises(ConfigInvalid, match=r"^port: "):
        load(None, {"port": 70000})


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

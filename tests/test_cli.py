"""The command line: what each command prints, and one clear line with a non-zero exit code for what can't work."""

import os
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from tests.patience import PATIENCE_S, until
from tests.servers import WaveProxy, free_port, http_request
from wave_proxy import __version__
from wave_proxy.__main__ import cli

Wave = Callable[..., WaveProxy]


def run(
    *arguments: str | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "wave_proxy", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), **(env or {})},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def one_line(result: subprocess.CompletedProcess[str]) -> str:
    """Standard error, when it is one line that says who speaks."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("wave-proxy: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return lines[0]


def test_version() -> None:
    for asked in ("version", "--version"):
        result = run(asked)
        assert (result.returncode, result.stdout) == (0, f"wave-proxy {__version__}\n")


@pytest.mark.parametrize(
    "command",
    [
        "serve",
        "proxy",
        "api",
        "builder",
        "config",
        "version",
        "token create",
        "token list",
        "token revoke",
        "account hash",
    ],
)
def test_every_command_explains_itself(command: str) -> None:
    result = run(*command.split(), "--help")
    assert result.returncode == 0
    assert "Usage:" in result.stdout


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("serve", "default: an embedded one"),
        ("proxy", "required, here or as redis_url"),
        ("api", "required, here or as redis_url"),
        ("builder", "required, here or as redis_url"),
        ("token list", "default: that of the service in --data"),
    ],
)
def test_help_says_which_redis_a_command_uses(command: str, said: str) -> None:
    assert f"({said})" in " ".join(run(*command.split(), "--help").stdout.split())


def test_help_shows_every_word_of_what_it_says() -> None:
    """Brackets too, which some formatters take for markup."""

    def walk(path: str, command: Any) -> Iterator[tuple[str, Any]]:
        yield path, command
        for name, child in getattr(command, "commands", {}).items():
            yield from walk(f"{path} {name}", child)

    for path, command in walk("wave-proxy", get_command(cli)):
        shown = command.get_help(command.make_context(path, [], resilient_parsing=True))
        options = [str(getattr(parameter, "help", None) or "") for parameter in command.params]
        for text in (command.help or "", *options):
            assert "".join(text.split()) in "".join(shown.split()), path


def test_a_variable_that_is_no_setting(tmp_path: Path, wave: Wave) -> None:
    result = run("config", env={"WAVE_CACHE_MAX_BYTES": "1GB", "WAVE_ENDPOINT": "http://wave"})
    assert (result.returncode, result.stdout) == (2, "")
    said = "WAVE_CACHE_MAX_BYTES: no such setting; did you mean WAVE_CACHE__MAX_BYTES?"
    assert one_line(result) == f"wave-proxy: {said}"
    started = wave(env={"WAVE_CACHE_MAX_BYTES": "1GB"})
    assert said in started.stderr


def test_config_prints_what_is_in_effect_and_hides_secrets(tmp_path: Path) -> None:
    file = tmp_path / "wave.toml"
    file.write_text(
        'port = 1234\n[registries."quay.io"]\nusername = "me"\npassword = "hidden-1"\n'
        f'[accounts]\nadmin = "sha256:{"0dd" * 21}f"\n[build]\nproxy = "http://me:hidden-2@proxy.cluster:3128"\n'
    )
    result = run("config", "--config", file, env={"WAVE_PORT": "4321", "WAVE_CACHE__TAG_TTL": "5m"})
    shown = tomllib.loads(result.stdout)
    assert result.returncode == 0
    assert (shown["port"], shown["cache"]["tag_ttl"]) == (4321, "5m")
    assert shown["registries"]["quay.io"]["username"] == "me"
    assert shown["build"]["proxy"] == "http://**********@proxy.cluster:3128"
    assert "hidden" not in result.stdout + result.stderr
    assert "0dd0dd" not in result.stdout + result.stderr


def test_what_config_prints_is_a_configuration(tmp_path: Path) -> None:
    (tmp_path / "again.toml").write_text(run("config").stdout)
    assert run("config", "--config", tmp_path / "again.toml").stdout == run("config").stdout


@pytest.mark.parametrize(
    ("toml", "environment", "expected"),
    [
        ("prot = 1", {}, ["prot: no such key"]),
        ("port = 70000", {}, ["port", "65535", "70000"]),
        ('[cache]\nmax_bytes = "lots"', {}, ["cache.max_bytes", "lots", "50GB"]),
        ('[quota]\npull_anonymous = "100"', {}, ["quota.pull_anonymous", "<max>/<duration>"]),
        ('[registries."not a host"]\n', {}, ["registries", "not a host"]),
        ('[registries."quay.io"]\nendpoint = "quay.io"', {}, ["registries.quay.io.endpoint", "http://"]),
        ("port = ", {}, ["bad.toml"]),
        ("", {"WAVE_WORKERS": "many"}, ["WAVE_WORKERS: ", "many"]),
        ('port = "x"\nworkers = "y"', {}, ["port", "workers"]),
    ],
    ids=["unknown-key", "port", "size", "quota", "host", "endpoint", "syntax", "environment", "all-at-once"],
)
def test_a_wrong_configuration_names_key_value_and_rule(
    tmp_path: Path, toml: str, environment: dict[str, str], expected: list[str]
) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(toml)
    result = run("serve", "--config", file, "--data", tmp_path / "data", env=environment)
    assert result.returncode == 2
    line = one_line(result)
    assert [word for word in expected if word not in line] == []


def test_a_missing_configuration_file_is_named(tmp_path: Path) -> None:
    result = run("config", "--config", tmp_path / "none.toml")
    assert result.returncode == 2
    assert "none.toml does not exist" in one_line(result)


def test_a_wrong_password_stays_out_of_the_message(tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text('[registries."quay.io"]\npassword = 12345\n')
    result = run("config", "--config", file)
    assert result.returncode == 2
    assert "registries.quay.io.password" in one_line(result)
    assert "12345" not in result.stderr


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_taken_port_is_one_clear_line(tmp_path: Path, host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as taken:
        taken.bind((host, 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = run("serve", "--host", host, "--port", str(port), "--data", tmp_path / "data")
    assert result.returncode == 1
    line = one_line(result)
    assert f":{port}" in line
    assert "in use" in line


def test_a_port_taken_by_another_wave_proxy_is_noticed_too(tmp_path: Path, wave: Wave) -> None:
    first = wave()
    result = run("serve", "--port", str(first.port), "--data", tmp_path / "other")
    assert result.returncode == 1
    assert "can't listen" in one_line(result)


def test_a_data_folder_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run("serve", "--port", "0", "--data", tmp_path / "file" / "data")
    assert result.returncode == 1
    assert "--data" in one_line(result)


def test_a_data_folder_serves_one_program(tmp_path: Path, wave: Wave) -> None:
    wave(data=tmp_path / "shared")
    result = run("serve", "--port", "0", "--data", tmp_path / "shared")
    assert result.returncode == 1
    assert "in use by another wave-proxy" in one_line(result)


def test_a_redis_that_does_not_answer_is_one_clear_line(tmp_path: Path) -> None:
    port = free_port()
    result = run(
        "serve",
        "--port",
        "0",
        "--data",
        tmp_path / "data",
        "--redis",
        f"redis://:hidden@127.0.0.1:{port}/0",
        "--workers",
        "1",
    )
    assert result.returncode == 1
    line = one_line(result)
    assert "Redis" in line
    assert f"127.0.0.1:{port}" in line
    assert "hidden" not in result.stderr


@pytest.mark.parametrize("command", ["proxy", "api", "builder"])
def test_a_part_alone_says_that_it_needs_a_redis(tmp_path: Path, command: str) -> None:
    result = run(command, "--data", tmp_path / "data")
    assert result.returncode == 1
    assert "--redis" in one_line(result)


def test_a_wrong_certificate_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "cert.pem").write_text("no certificate")
    (tmp_path / "k").write_text("no key")
    files = {"WAVE_TLS_CERT": str(tmp_path / "cert.pem"), "WAVE_TLS_KEY": str(tmp_path / "k")}
    for command, status in ((["serve", "--port", "0", "--data", tmp_path / "data"], 1), (["config"], 2)):
        result = run(*command, env=files)
        assert (result.returncode, result.stdout) == (status, "")
        assert one_line(result).endswith("cert.pem is no PEM certificate")


def test_sigterm_ends_it_cleanly(wave: Wave) -> None:
    proxy = wave(workers=2)
    children = set(proxy.processes())
    assert proxy.stop() == 0
    assert [pid for pid in children if Path(f"/proc/{pid}").exists()] == []


def test_interrupt_ends_it_cleanly(wave: Wave) -> None:
    proxy = wave()
    os.kill(proxy.pid, signal.SIGINT)
    assert proxy.stop() == 0


def test_the_parts_work_together_when_each_is_started_alone(tmp_path: Path, redis_url: str) -> None:
    port = free_port()
    shared = ["--data", str(tmp_path / "data"), "--redis", redis_url]
    commands = (["api", *shared], ["builder", *shared], ["proxy", *shared, "--port", str(port), "--workers", "1"])
    command = [sys.executable, "-m", "wave_proxy"]
    logs = [tmp_path / arguments[0] for arguments in commands]
    environment = {**os.environ, "WAVE_LOG__LEVEL": "debug"}
    processes = []
    for arguments, log in zip(commands, logs, strict=True):
        with log.open("w") as file:
            processes.append(subprocess.Popen([*command, *arguments], stderr=file, env=environment))
    try:
        until(
            lambda: (
                answers(f"127.0.0.1:{port}", "/v2/")
                and answers(f"127.0.0.1:{port}", "/service-info")
                and "builder is running" in logs[1].read_text()
            ),
            lambda: "\n".join(log.read_text() for log in logs),
        )
    finally:
        for process in processes:
            process.terminate()
    assert [process.wait(PATIENCE_S) for process in processes] == [0, 0, 0]


def answers(address: str, path: str) -> bool:
    try:
        return http_request(address, "GET", path).status == 200
    except OSError:
        return False


@pytest.mark.parametrize("config", ["", 'server_url = "http://wave.cluster:9090"'], ids=["unset", "set"])
def test_a_server_for_all_that_does_not_know_its_name_says_so(wave: Wave, config: str) -> None:
    proxy = wave(args=["--host", "0.0.0.0"], config=config)
    assert proxy.stop() == 0
    assert ("server_url is not set: image names begin with localhost" in proxy.stderr) == (not config)


@pytest.mark.parametrize(
    ("toml", "expected"),
    [
        (
            '[registries."quay.io"]\nusername = "me"\npassword_file = "/none/pw"',
            ["password_file", "/none/pw", "No such"],
        ),
        ('[registries."quay.io"]\nca_file = "/none/ca"', ["ca_file", "/none/ca"]),
        ('[registries."quay.io"]\nusername = "me"', ["registries.quay.io", "password"]),
        ('[registries."quay.io"]\npassword = "secret-1"', ["registries.quay.io", "username"]),
        ('tls_cert = "/none/cert"', ["tls_cert", "/none/cert"]),
        ('server_url = "http://wave/sub"', ["server_url", "path"]),
    ],
    ids=["password-file", "ca-file", "no-password", "no-username", "tls", "server-url"],
)
def test_what_could_not_work_is_said_before_anything_starts(tmp_path: Path, toml: str, expected: list[str]) -> None:
    file = tmp_path / "wave.toml"
    file.write_text(toml)
    for command in (["config"], ["serve", "--port", "0", "--data", tmp_path / "data"]):
        result = run(*command, "--config", file)
        assert result.returncode == 2
        assert [word for word in expected if word not in one_line(result)] == []
        assert "secret-1" not in result.stderr


def test_a_certificate_without_its_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cert.pem").touch()
    result = run("serve", "--port", "0", "--data", tmp_path / "data", "--tls-cert", tmp_path / "cert.pem")
    assert result.returncode == 2
    assert one_line(result).startswith("wave-proxy: TLS needs both tls_cert and tls_key: tls_key is not set")


def test_a_worker_without_redis_says_so_in_one_line(tmp_path: Path) -> None:
    environment = {"WAVE_REDIS_URL": f"unix://{tmp_path}/none.sock", "WAVE_API_SOCKET": str(tmp_path / "api.sock")}
    result = subprocess.run(
        [sys.executable, "-m", "wave_proxy.serve"],
        env={**os.environ, **environment, "WAVE_PORT": str(free_port()), "WAVE_DATA": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert result.returncode == 1
    assert "none.sock does not answer" in one_line(result)

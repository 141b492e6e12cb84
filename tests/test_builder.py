"""``python -m builder`` as a process: it waits for work and ends when told to."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def start(**settings: str) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WAVE_")}
    environment |= {"PYTHONPATH": str(ROOT), "WAVE_LOG__FORMAT": "json", **settings}
    return subprocess.Popen([sys.executable, "-m", "builder"], env=environment, stderr=subprocess.PIPE, text=True)


def test_a_builder_runs_until_sigterm(redis_url: str) -> None:
    with start(WAVE_REDIS_URL=redis_url, WAVE_LOG__LEVEL="debug") as builder:
        assert builder.stderr is not None
        assert "builder is running" in builder.stderr.readline()
        builder.send_signal(signal.SIGTERM)
        _, log = builder.communicate()
    assert builder.returncode == 0
    assert "builder stopped" in log
    assert "[build] secret is empty: images can't be pushed to wave-proxy's local repositories" in log


def test_a_builder_reads_the_configuration_file(redis_url: str, tmp_path: Path) -> None:
    file = tmp_path / "wave.toml"
    file.write_text(f'redis_url = "{redis_url}"\n')
    with start(WAVE_CONFIG_FILE=str(file), WAVE_LOG__LEVEL="debug") as builder:
        assert builder.stderr is not None
        assert "builder is running" in builder.stderr.readline()
        builder.send_signal(signal.SIGINT)
        builder.communicate()
    assert builder.returncode == 0


@pytest.mark.parametrize(
    ("settings", "code", "text"),
    [
        pytest.param({}, 2, "set WAVE_REDIS_URL", id="no-redis"),
        pytest.param({"WAVE_REDIS_URL": "http://user:secret@localhost"}, 2, "WAVE_REDIS_URL: expected", id="bad-url"),
        pytest.param({"WAVE_PORT": "x"}, 2, "WAVE_PORT: ", id="bad-key"),
        pytest.param({"WAVE_CONFIG_FILE": "/missing.toml"}, 2, "/missing.toml does not exist", id="no-file"),
        pytest.param({"WAVE_REDIS_URL": "unix:///missing.sock"}, 1, "does not answer", id="redis-gone"),
    ],
)
def test_a_builder_that_cannot_start_says_why_in_one_line(settings: dict[str, str], code: int, text: str) -> None:
    with start(**settings) as builder:
        _, log = builder.communicate()
    assert builder.returncode == code
    assert len(log.splitlines()) == 1
    assert text in log
    assert "secret" not in log

"""The demonstration as users run it, and the clients that it counts on to notice every wrong byte."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import which
from tempfile import TemporaryDirectory

import pytest

from bench.demo import NEXT, REPOSITORY, TAG, sample_image
from bench.herd import Herd, PullFailed, quantile
from bench.images import busybox_image, has_busybox
from bench.upstream import Faults, Upstream
from tests.patience import PATIENCE_S, until
from tests.servers import ROOT, WaveProxy, free_port

SMALL = ("--clients", "4", "--megabytes", "1")


@contextmanager
def demo(*arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """The demonstration as a child; its temporary folder is made in an empty one, which has to be empty again."""
    with TemporaryDirectory(prefix="demo-") as folder:  # a socket's path may have 107 bytes
        with _demo_in(Path(folder), *arguments) as process:
            yield process
        assert os.listdir(folder) == []


@contextmanager
def _demo_in(folder: Path, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-m", "bench.demo", *arguments]
    environment = {**os.environ, "TMPDIR": str(folder), "COLUMNS": "100", "WAVE_PORT": "not a port"}
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def read_until(process: "subprocess.Popen[str]", word: str) -> str:
    """The line that tells of a step."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(f"  ok  {word} "):
            return line
    pytest.fail(f"no line for {word!r}: {process.communicate()[1]}")


def descendants(pid: int) -> dict[int, str]:
    """Living processes that a process, or one that it started, has started: id to command line."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue  # it just ended
        if state not in "ZX":
            parents[int(folder.name)] = int(parent)
    found: dict[int, str] = {}
    front = {pid}
    while front:
        front = {child for child, parent in parents.items() if parent in front}
        found |= {child: command_line(child) for child in front}
    return found


def command_line(pid: int) -> str:
    """Empty when there is no such process."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except OSError:
        return ""


def assert_all_end(processes: dict[int, str]) -> None:
    """Some end on their own a moment after the one that they served."""

    def left() -> dict[int, str]:
        return {pid: title for pid, title in processes.items() if command_line(pid)}

    until(lambda: not left(), lambda: str(left()))


def test_demo_shows_what_happened_and_what_to_do_next() -> None:
    with demo(*SMALL) as process:
        output, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, errors
    assert errors == ""
    assert re.search(rf"requested +127\.0\.0\.1:\d+/{REPOSITORY}:{TAG} \(3 layers, 1\.\d MB", output)
    assert re.search(rf"image given +localhost:\d+/wt/[0-9a-f]{{32}}/{REPOSITORY}:{TAG}\n", output)
    rows = {cells[0]: cells[1:] for line in output.splitlines() if len(cells := re.split(r"\s*│\s*", line)[1:-1]) > 1}
    assert rows["clients"][:2] == ["4", "4"]
    assert rows["digests verified"][:2] == ["28", "28"]  # of each: index, manifest, config, three layers and ours
    assert rows["upstream fetches per layer"][:2] == ["1", "0"]
    assert rows["upstream requests, all"][1] == "0"
    assert (len(rows["clients"]) == 3) == (which("skopeo") is not None)
    assert re.search(r"warm manifest +[\d,]+ requests/s, p50 [\d.]+ m?s, p99 ", output)
    assert re.search(r"All [\d,]+ digests were right\.", output)
    assert re.search(r"^  \S.* ?wave[-_]proxy serve$", output, re.MULTILINE)
    assert 'docker pull "$image"' in output


def test_ctrl_c_ends_everything() -> None:
    with demo("--clients", "4", "--megabytes", "32") as process:
        read_until(process, "wave-proxy")
        started = descendants(process.pid)
        assert {"api", "wave_proxy"} <= {word for title in started.values() for word in title.split()}
        for pid in (process.pid, *(pid for pid, title in started.items() if "spawn_main" in title)):
            os.kill(pid, signal.SIGINT)  # a terminal sends it to all
        _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert errors == "demo: interrupted; everything is stopped and removed\n"
    assert_all_end(started)


def test_a_service_that_dies_is_a_failure() -> None:
    with demo("--clients", "4", "--megabytes", "32") as process:
        read_until(process, "wave-proxy")
        started = descendants(process.pid)
        service = min(pid for pid, title in started.items() if " serve " in title)
        os.kill(service, signal.SIGKILL)
        output, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert "demo failed: " in errors
    assert "wave-proxy has ended with exit code -9; the end of its log:\n  ready http" in errors
    assert "digests were right" not in output
    assert_all_end(started)


@pytest.mark.parametrize("arguments", [("--clients", "0"), ("--megabytes", "x")], ids=" ".join)
def test_wrong_arguments_are_named(arguments: tuple[str, str]) -> None:
    with demo(*arguments) as process:
        _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2
    assert f"argument {arguments[0]}: invalid" in errors


@pytest.mark.skipif(not has_busybox(), reason="needs /bin/busybox (Debian package busybox-static)")
@pytest.mark.skipif(which("curl") is None, reason="needs curl")
def test_the_lines_to_paste_name_an_image_that_can_be_pulled(
    upstream: Callable[..., Upstream], wave: Callable[..., WaveProxy]
) -> None:
    hub = upstream()
    hub.add("library/ubuntu", busybox_image(), "latest")
    proxy = wave(config=f'[registries."docker.io"]\nendpoint = "{hub.url}"\n')
    shown = NEXT.format(serve="wave-proxy serve").replace("localhost:9090", proxy.address)
    (request,) = (block for block in shown.split("\n\n") if "curl" in block)
    done = subprocess.run(["sh", "-c", request], capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stderr) == (0, "")
    assert "GREETING=hello" in proxy.pull(done.stdout.strip()).config["config"]["Env"]


# --- the clients -----------------------------------------------------------------------------------------------------


def test_sample_is_always_the_same() -> None:
    assert sample_image(1) == sample_image(1)
    assert sample_image(1).digest != sample_image(2).digest


@pytest.mark.parametrize(
    ("faults", "told"),
    [
        (Faults(), ""),
        (Faults(corrupt_last_byte=True), "came with other content: sha256:"),
        (Faults(truncate_at=1000, truncate_times=-1), "the connection ended after 1000 bytes of the body"),
        (Faults(extra_bytes=1), "bytes, not "),
        (Faults(status={"/blobs/": 503}), "status 503"),
        (Faults(content_type="text/html", html_login=True), "docker-content-digest"),
    ],
    ids=["none", "corrupt", "truncated", "long", "status", "page"],
)
def test_herd_notices(upstream: Callable[..., Upstream], faults: Faults, told: str) -> None:
    registry = upstream(faults=faults)
    registry.add(REPOSITORY, sample_image(1), TAG)
    with Herd(2) as herd:
        pulls = herd.pull(f"{registry.address}/{REPOSITORY}:{TAG}", 3)
    assert len(pulls) == 3
    for pull in pulls:
        assert told in pull.error
        assert bool(pull.error) == bool(told), pull.error


def test_herd_asks_for_a_while(upstream: Callable[..., Upstream]) -> None:
    registry = upstream()
    registry.add(REPOSITORY, sample_image(1), TAG)
    with Herd(1) as herd:
        load = herd.ask(f"{registry.address}/{REPOSITORY}:{TAG}", 2, 0.1)
        assert len(load.latencies_s) == len(registry.log) > 1
        assert 0 < quantile(load.latencies_s, 0.5) <= max(load.latencies_s) <= load.duration_s
        with pytest.raises(PullFailed, match="status 404"):
            herd.ask(f"{registry.address}/{REPOSITORY}:missing", 2, 0.1)
        assert len(herd.pull(f"{registry.address}/{REPOSITORY}:{TAG}", 1)) == 1  # the clients are still there


def test_herd_says_when_nobody_listens() -> None:
    with Herd(2) as herd, pytest.raises(PullFailed, match="refused"):
        herd.pull(f"127.0.0.1:{free_port()}/{REPOSITORY}:{TAG}", 4)


def test_quantile() -> None:
    assert [quantile([3.0, 1.0, 2.0, 4.0], part) for part in (0.0, 0.5, 0.99, 1.0)] == [1.0, 3.0, 4.0, 4.0]

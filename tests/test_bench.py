"""The arithmetic of the benchmarks, and small real runs of them: that they work, never how fast anything is."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from math import inf, isnan
from pathlib import Path
from socket import create_server, socket
from tempfile import TemporaryDirectory
from time import sleep

import pytest

from bench.__main__ import main
from bench.clients import ask_each
from bench.crowd import Crowd, Presence
from bench.images import blob, image, layer, random_blob
from bench.peers import PULL_THROUGH, WAVE, Missing, Peer, find_program
from bench.plan import alternate
from bench.report import Goal, Result, Verdict, number, table, to_json
from bench.scenarios import SCENARIOS
from bench.storm import Storm
from bench.upstream import Upstream
from tests.patience import PATIENCE_S, until
from tests.servers import ROOT

LIMIT_S = 5 * PATIENCE_S  # of a run, which has its own waits
OTHER = "nginx proxy_cache"
BIG = blob(random_blob(32 << 20, 1))


def result(ours: Sequence[float], theirs: Sequence[float] = (), goals: Sequence[Goal] = (), **more: object) -> Result:
    figures: Mapping[str, Sequence[float]] = {WAVE: ours, OTHER: theirs} if theirs else {WAVE: ours}
    return Result("s", "warm manifest", "1/s", figures, goals, **more)  # type: ignore[arg-type]


def has(*programs: str) -> bool:
    try:
        return all(map(find_program, programs))
    except Missing:
        return False


@contextmanager
def temporary_folder() -> Iterator[dict[str, str]]:
    """An environment whose temporary folder, with a space in its name, must be empty at the end of the block."""
    # A socket's path may have 107 bytes; folders of tests are longer than that.
    with TemporaryDirectory(prefix="b ") as folder:
        yield {**os.environ, "TMPDIR": folder}
        assert os.listdir(folder) == []


def run_bench(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """``python -m bench``."""
    command = [sys.executable, "-m", "bench", *arguments]
    with temporary_folder() as environment:
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S)


def children(pid: int) -> list[int]:
    """The processes that a process has started; none when it has ended."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def peer(name: str) -> Peer:
    return Peer(name, "127.0.0.1:1", lambda sample: sample.repository, list)


# --- arithmetic ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ([30.0, 90.0, 40.0], [10.0, 100.0, 10.0], 3.0),  # of the rounds' ratios 3, 0.9 and 4, not of the medians
        ([1.0, 3.0], [1.0, 1.0], 2.0),
        ([5.0], [0.0], inf),
        ([0.0], [0.0], 1.0),
    ],
    ids=["by round", "even", "peer is zero", "both are zero"],
)
def test_ratio_is_the_median_of_the_rounds_ratios(ours: list[float], theirs: list[float], expected: float) -> None:
    assert result(ours, theirs).ratio(OTHER) == expected


def test_ratio_to_a_missing_peer_is_not_a_number() -> None:
    assert isnan(result([1.0]).ratio(OTHER))


@pytest.mark.parametrize(
    ("goal", "expected"),
    [
        (Goal("at least", 1.5, OTHER), "held"),
        (Goal("at least", 1.6, OTHER), "missed"),
        (Goal("at most", 1.5, OTHER), "held"),
        (Goal("at most", 1.4, OTHER), "missed"),
        (Goal("at most", 15.0), "held"),
        (Goal("at most", 14.9), "missed"),
        (Goal("at least", 50, PULL_THROUGH), "not measured"),
    ],
    ids=str,
)
def test_goals(goal: Goal, expected: Verdict) -> None:
    assert result([15.0, 15.0, 99.0], [10.0, 10.0, 66.0]).judge(goal) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0, "0"),
        (1.0, "1"),
        (0.00123456, "0.00123"),
        (1.1349, "1.13"),
        (147.4, "147"),
        (1048.0, "1,050"),
        (102_345.0, "102,000"),
        (inf, "inf"),
    ],
)
def test_number(value: float, expected: str) -> None:
    assert number(value) == expected


def test_table_names_what_is_missing() -> None:
    goals = Goal("at least", 1.5, OTHER), Goal("at least", 50, PULL_THROUGH)
    shown = table([result([300.0, 100.0], [100.0, 100.0], goals, missing={PULL_THROUGH: "no program"}, notes=["odd"])])
    rows = [re.split(r" *\| *", line)[1:-1] for line in shown.splitlines() if line.startswith("|")]
    assert len({len(line) for line in shown.splitlines() if line.startswith("|")}) == 1
    assert rows[2:] == [
        ["warm manifest (1/s)", WAVE, "200", "100 – 300", "", "", ""],
        ["", OTHER, "100", "100 – 100", "2 ×", "≥ 1.5 ×", "held"],
        ["", PULL_THROUGH, "missing", "no program", "", "≥ 50 ×", "not measured"],
    ]
    assert shown.endswith("\n\n- warm manifest: odd")


def test_json_holds_every_figure() -> None:
    made = result([3.0, 1.0], [1.0, 0.0], [Goal("at most", 1.0)])
    document = json.loads(to_json([made], {"memory": "1 GB"}, {"repeats": 2}))
    assert document["machine"] == {"memory": "1 GB"}
    assert document["settings"] == {"repeats": 2}
    (shown,) = document["results"]
    assert shown["figures"] == {WAVE: [3.0, 1.0], OTHER: [1.0, 0.0]}
    assert shown["medians"] == {WAVE: 2.0, OTHER: 0.5}
    assert shown["ratios"] == {}  # it is infinite, which JSON can't say
    assert shown["goals"] == [{"rule": "at most", "bound": 1.0, "versus": "", "verdict": "missed"}]


def test_peers_take_turns() -> None:
    asked: list[tuple[str, int]] = []

    def measure(of: Peer, round_: int) -> dict[str, float]:
        asked.append((of.name, round_))
        return {"rate": float(len(asked))}

    figures = alternate([peer("a"), peer("b")], 2, measure)
    assert asked == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert figures == {"rate": {"a": [1.0, 3.0], "b": [2.0, 4.0]}}


# --- clients ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def manifest(upstream: Callable[..., Upstream]) -> tuple[Upstream, str]:
    """A registry, and the path of a manifest there."""
    started, made = upstream(), image([layer({"file": "content"})])
    started.add("library/tool", made, "1")
    started.add_blob("library/tool", BIG)
    return started, "/v2/library/tool/manifests/1"


def test_a_crowd_stays_and_reads_slowly(manifest: tuple[Upstream, str]) -> None:
    server, path = manifest
    with Crowd(server.address) as crowd:
        crowd.join(path, 40, f"/v2/library/tool/blobs/{BIG.digest}", 100)
        sleep(0.5)  # some have had their turn
        presence = crowd.leave()
        assert presence.open == 140
        assert 0 < presence.received < BIG.size
        assert crowd.leave() == Presence(0, 0)
        with pytest.raises(RuntimeError, match="404"):
            crowd.join(path + "0", 1, path, 0)


def test_a_crowd_notices_connections_that_were_closed() -> None:
    def answer(listener: socket) -> socket:
        accepted = []
        for _ in range(2):
            connection, _ = listener.accept()
            connection.recv(1000)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            accepted.append(connection)
        accepted[0].close()
        return accepted[1]

    with create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as thread:
        answering = thread.submit(answer, listener)
        with Crowd(f"127.0.0.1:{listener.getsockname()[1]}") as crowd:
            crowd.join("/", 2, "/", 0)
            with answering.result():
                assert crowd.leave() == Presence(1, 0)


def test_a_storm_notes_who_was_let_in_and_who_was_not(manifest: tuple[Upstream, str]) -> None:
    server, path = manifest
    server.faults.status, server.faults.fail_times = {path: 429}, 7
    with Storm([server.address], path, connections=4, duration_s=1.5) as storm:
        began = storm.begin()
        outcome = storm.outcome()
    assert outcome.others == {429: 7}
    assert (outcome.lost, outcome.errors) == (0, 0)
    assert len(outcome.admitted) == len(server.log) - 7 > 0
    assert all(
        sent <= answered for sent, answered in zip(outcome.admitted.sent, outcome.admitted.answered, strict=True)
    )
    assert outcome.admitted.between(began, began + 60.0) > 0


def test_each_manifest_is_asked_for_once(manifest: tuple[Upstream, str]) -> None:
    server, path = manifest
    paths = [f"{path}?{number}" for number in range(20)]
    assert ask_each(server.address, paths, 3) > 0
    assert sorted(asked.path for asked in server.log) == sorted(paths)
    with pytest.raises(ExceptionGroup):
        ask_each(server.address, [path + "0"], 1)


# --- the command -----------------------------------------------------------------------------------------------------


def test_list_names_every_scenario(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(SCENARIOS)
    assert all(line.endswith(".") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--only", "nothing"], "argument --only: invalid choice: 'nothing'"),
        (["--repeats", "-1"], "--repeats must be 1 or more"),
    ],
    ids=["scenario", "repeats"],
)
def test_wrong_arguments_are_named(capsys: pytest.CaptureFixture[str], arguments: list[str], told: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def test_plot_without_matplotlib_is_refused_at_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    with pytest.raises(SystemExit):
        main(["--plot", "x.svg"])
    assert "--plot needs matplotlib, which is not installed: pip install -e '.[bench]'" in capsys.readouterr().err


def test_programs_that_are_missing_are_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.peers.which", lambda *_, **__: None)
    assert main(["--only", "warm-manifest", "--only", "cold-blob"]) == 1
    shown = capsys.readouterr()
    assert "warm-manifest not measured: wrk is not installed (Debian package wrk)" in shown.err
    assert "cold-blob not measured: nginx is not installed (Debian package nginx-light)" in shown.err
    assert "docker-registry: missing" in shown.out


def test_a_run_without_other_programs(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    done = run_bench("--quick", "--repeats", "1", "--only", "start", "--json", str(file))
    assert done.returncode == 0, done.stderr
    assert re.search(r"\| idle proxy worker \(MB\) +\| wave-proxy +\| [\d.]+ ", done.stdout)
    document = json.loads(file.read_text())
    assert {"date", "processor", "kernel", "nginx"} <= set(document["machine"])
    assert document["settings"] == {"repeats": 1, "quick": True}
    assert [len(item["figures"][WAVE]) for item in document["results"]] == [1, 1, 1]
    assert all(item["figures"][WAVE][0] > 0 for item in document["results"])


@pytest.mark.skipif(not has("nginx"), reason="needs nginx (Debian package nginx-light)")
def test_a_run_beside_nginx(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    done = run_bench("--quick", "--repeats", "1", "--only", "cold-blob", "--json", str(file))
    assert done.returncode == 0, done.stderr
    (shown,) = json.loads(file.read_text())["results"]
    assert {WAVE, OTHER} <= set(shown["figures"])
    assert shown["ratios"][OTHER] > 0
    assert set(shown["missing"]) == (set() if has("docker-registry") else {PULL_THROUGH})


@pytest.mark.skipif(not has("nginx", "wrk"), reason="needs nginx and wrk (Debian packages nginx-light, wrk)")
def test_a_run_with_wrk() -> None:
    done = run_bench("--quick", "--repeats", "1", "--only", "storm")
    assert done.returncode == 0, done.stderr
    assert re.search(r"keep-alive \(errors\) +\| wave-proxy +\| 0 .* held +\|", done.stdout), done.stdout
    assert re.search(r"keep-alive \(upstream requests\) +\| wave-proxy +\| 0 .* held +\|", done.stdout), done.stdout


@pytest.mark.skipif(not has("wrk"), reason="needs wrk (Debian package wrk)")
def test_a_run_of_polls(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    done = run_bench("--quick", "--repeats", "1", "--only", "status", "--json", str(file))
    assert done.returncode == 0, done.stderr
    results = json.loads(file.read_text())["results"]
    assert [result["unit"] for result in results] == ["1/s", "1/processor s", "ms"]
    assert all(value > 0 for result in results for (value,) in result["figures"].values())


@pytest.mark.skipif(not has("nginx"), reason="needs nginx (Debian package nginx-light)")
def test_a_run_with_redis_away_and_one_of_tokens(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    done = run_bench("--quick", "--repeats", "1", "--only", "redis-away", "--only", "tokens", "--json", str(file))
    assert done.returncode == 0, done.stderr
    results = json.loads(file.read_text())["results"]
    exact = [result for result in results if result["unit"] in ("errors", "of the pulls")]
    assert [[goal["verdict"] for goal in result["goals"]] for result in exact] == [["held"], ["held", "held"]]
    assert all(value > 0 for result in results if result not in exact for (value,) in result["figures"].values())


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="needs matplotlib (extra `bench`)")
def test_plot_draws_a_picture(tmp_path: Path) -> None:
    file = tmp_path / "figures.svg"
    done = run_bench("--quick", "--repeats", "1", "--only", "start", "--plot", str(file))
    assert done.returncode == 0, done.stderr
    assert "idle proxy worker" in file.read_text()


def test_sigterm_ends_everything() -> None:
    command = [sys.executable, "-m", "bench", "--quick", "--only", "start"]
    with (
        temporary_folder() as environment,
        subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process,
    ):
        assert process.stderr is not None
        assert process.stderr.read(5) == "start"
        # The service is one child; it has started its parts when there are children of that.
        parts = until(
            lambda: [part for child in children(process.pid) for part in children(child)], lambda: f"{process.poll()}"
        )
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 128 + signal.SIGTERM
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in parts))  # killed, maybe not gone yet

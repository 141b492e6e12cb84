"""Tasks that wait for their containers, and ask how far these are."""

import json
from base64 import b64encode
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import run

from bench.clients import WRK_TIMEOUT_S, Load, processor_s
from bench.peers import WAVE, Peer, find_program, make_wave, running_wave
from bench.plan import WORKERS, Plan, alternate
from bench.report import Goal, Result
from tests.servers import WaveProxy, http_request

_POLLS = 10_000  # ten a second from each of a thousand tasks
_CONNECTIONS = 256
# A request for a part is never answered from memory, and the api gives the whole all the same.
_HEADERS = {WAVE: "", "every poll forwarded to the api": "Range: bytes=0-"}
# Builds wait for nothing here: that of all tasks fails at once, and stays known.
_CONFIG = """
[build]
engine = "buildkit"
buildkit_address = "tcp://127.0.0.1:1"
failure_memory = "1h"
[quota]
build_anonymous = "off"
"""
_SCRIPT = """\
local paths, number = {{ {paths} }}, 0
request = function()
  number = number % #paths + 1
  return wrk.format('GET', paths[number])
end
done = function(summary, latency)
  local errors = summary.errors
  local lost = errors.connect + errors.read + errors.write + errors.timeout
  print(string.format('\\n[%d, %d, %d, %d, %d]', summary.requests, summary.duration, latency:percentile(99),
    errors.status, lost))
end
"""


def status(plan: Plan) -> Iterator[Result]:
    """1,000 tasks ask how far their containers are, from memory and with every poll forwarded."""
    tasks, duration_s = plan.choose(1000, 200), plan.choose(5, 2)
    proxy = make_wave(plan.folder / "wave", workers=WORKERS, config=_CONFIG)
    with running_wave(proxy):
        paths = _submit(proxy, tasks)
        peers = [Peer(name, proxy.address, lambda _: "", lambda: list(proxy.processes())) for name in _HEADERS]

        def measure(peer: Peer, _: int) -> dict[str, float]:
            before_s = processor_s(peer.pids())
            load = _poll(plan.folder, peer.address, paths, _HEADERS[peer.name], duration_s)
            took_s = processor_s(peer.pids()) - before_s
            assert not load.errors, f"{peer.name}: {load.errors} errors"
            return {"1/s": load.rate, "1/processor s": load.answers / took_s, "ms": 1000 * load.p99_s}

        figures = alternate(peers, plan.repeats, measure)
    work = f"{tasks:,} tasks poll over {_CONNECTIONS} connections, {WORKERS} workers"
    yield Result("status", work, "1/s", figures["1/s"], [Goal("at least", _POLLS)])
    yield Result("status", f"{work}: all processes", "1/processor s", figures["1/processor s"])
    yield Result("status", f"{work}: p99", "ms", figures["ms"])


def _submit(proxy: WaveProxy, tasks: int) -> list[str]:
    """Ask for one built image so many times, each time with a token; where to ask for their states."""
    file = b64encode(b"FROM scratch\n").decode()
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda _: proxy.submit(containerFile=file), range(tasks)))
    paths = [f"/v1alpha2/container/{answer['requestId']}/status" for answer in answers]
    for path in paths[:: max(tasks // 10, 1)]:
        answer = http_request(proxy.address, "GET", path)
        assert answer.status == 200, f"{path}: status {answer.status}"
        assert answer.json()["buildId"] == answers[0]["buildId"]
    return paths


def _poll(folder: Path, address: str, paths: Sequence[str], header: str, duration_s: int) -> Load:
    """Ask for all of them in turn, as fast as one thread of wrk can, with that header."""
    script = folder / "polls.lua"
    script.write_text(_SCRIPT.format(paths=", ".join(f"'{path}'" for path in paths)))
    command = [find_program("wrk"), "-t1", f"-c{_CONNECTIONS}", f"-d{duration_s}s", f"--timeout={WRK_TIMEOUT_S}s"]
    command += ["-H", header] if header else []
    done = run([*command, "-s", str(script), f"http://{address}"], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"wrk failed: {done.stdout[-500:]}{done.stderr[-500:]}")
    requests, duration_us, p99_us, refused, lost = json.loads(done.stdout.strip().splitlines()[-1])
    return Load(requests - refused, refused + lost, duration_us / 1e6, p99_us / 1e6)

"""What asks the servers: wrk, readers of big blobs, a steady client; and what processes take."""

import asyncio
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection
from mmap import MAP_ANONYMOUS, MAP_POPULATE, MAP_PRIVATE, mmap
from pathlib import Path
from subprocess import run
from tempfile import NamedTemporaryFile
from time import monotonic

from bench.peers import Peer, Sample, find_program
from tests.servers import PulledImage, pull
from wave_proxy.image.oci import ACCEPT_MANIFESTS

WRK_TIMEOUT_S = 30
LATE_S = 1.0  # how long paced() waits for the last answers
_BUFFER_BYTES = 1 << 18

_WRK_SCRIPT = """\
done = function(summary, latency)
  local errors = summary.errors
  local lost = errors.connect + errors.read + errors.write + errors.timeout
  print(string.format('\\n{"requests": %d, "duration_us": %d, "p99_us": %d, "refused": %d, "lost": %d}',
    summary.requests, summary.duration, latency:percentile(99), errors.status, lost))
end
"""


@dataclass(frozen=True)
class Load:
    """What wrk saw: good answers, errors of every kind, and the latency of answers; and how much of a core it took."""

    answers: int
    errors: int
    duration_s: float
    p99_s: float
    wrk_share: float = 0.0

    @property
    def rate(self) -> float:
        """Good answers a second."""
        return self.answers / self.duration_s


def wrk(address: str, path: str, *, connections: int, duration_s: int, keep_alive: bool = True) -> Load:
    """Ask for a manifest as fast as one thread can. Raises Missing, and RuntimeError when wrk fails."""
    with NamedTemporaryFile("w", prefix="bench-", suffix=".lua") as script:
        script.write(_WRK_SCRIPT)
        script.flush()
        command = [find_program("wrk"), "-t1", f"-c{connections}", f"-d{duration_s}s", f"--timeout={WRK_TIMEOUT_S}s"]
        command += ["-s", script.name, "-H", f"Accept: {ACCEPT_MANIFESTS}"]
        command += [] if keep_alive else ["-H", "Connection: close"]
        before = os.times()
        done = run([*command, f"http://{address}{path}"], capture_output=True, text=True)
        after = os.times()
    if done.returncode:
        raise RuntimeError(f"wrk failed: {done.stdout[-500:]}{done.stderr[-500:]}")
    told = json.loads(done.stdout.strip().splitlines()[-1])
    answers = told["requests"] - told["refused"]
    duration_s = told["duration_us"] / 1e6
    took_s = after.children_user + after.children_system - before.children_user - before.children_system
    return Load(answers, told["refused"] + told["lost"], duration_s, told["p99_us"] / 1e6, took_s / duration_s)


def drain(address: str, path: str, size: int, clients: int) -> float:
    """Read one blob with so many clients at once; returns the seconds. Raises AssertionError for another length."""
    with ThreadPoolExecutor(clients) as threads:
        began = monotonic()
        sizes = list(threads.map(lambda _: _read(address, path), range(clients)))
        duration_s = monotonic() - began
    assert sizes == [size] * clients, f"{address}{path}: {sizes} bytes, not {size} each"
    return duration_s


def _read(address: str, path: str) -> int:
    buffer, size = memoryview(bytearray(_BUFFER_BYTES)), 0
    connection = HTTPConnection(address, timeout=120)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        assert answer.status == 200, f"{address}{path}: status {answer.status}"
        while part := answer.readinto(buffer):
            size += part
    finally:
        connection.close()
    return size


def paced(address: str, path: str, *, connections: int, interval_s: float, duration_s: float) -> list[float]:
    """Ask on each connection once an interval; the seconds from when each request was due to its answer.

    A request that has no answer at the end counts for as long as it waited, and so do those that were due behind it.
    """
    return asyncio.run(_pace(address, path, connections, interval_s, duration_s))


async def _pace(address: str, path: str, connections: int, interval_s: float, duration_s: float) -> list[float]:
    began = monotonic() + 0.1
    due = [began + number * interval_s for number in range(int(duration_s / interval_s))]
    shift = interval_s / connections
    latencies = await asyncio.gather(
        *(_ask_when_due(address, path, [at + shift * number for at in due]) for number in range(connections))
    )
    return [latency for some in latencies for latency in some]


async def _ask_when_due(address: str, path: str, due: list[float]) -> list[float]:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    request = f"GET {path} HTTP/1.1\r\nHost: {address}\r\nAccept: {ACCEPT_MANIFESTS}\r\n\r\n".encode()
    latencies: list[float] = []
    try:
        async with asyncio.timeout(due[-1] - monotonic() + LATE_S):
            for at in due:
                await asyncio.sleep(at - monotonic())
                writer.write(request)
                await _read_answer(reader)
                latencies.append(monotonic() - at)
    except TimeoutError:
        now = monotonic()
        latencies += [now - at for at in due[len(latencies) :]]
    finally:
        writer.transport.abort()
    return latencies


async def _read_answer(reader: asyncio.StreamReader) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    assert head.startswith(b"HTTP/1.1 200 "), head
    assert length is not None, head
    await reader.readexactly(int(length[1]))


def ask_each(address: str, paths: Sequence[str], connections: int) -> float:
    """Get each manifest once, over so many connections; returns the seconds.

    Raises ExceptionGroup of AssertionError for any other answer.
    """
    return asyncio.run(_ask_each(address, paths, connections))


async def _ask_each(address: str, paths: Sequence[str], connections: int) -> float:
    left = iter(paths)
    began = monotonic()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(connections):
            tasks.create_task(_ask_next(address, left))
    return monotonic() - began


async def _ask_next(address: str, left: Iterator[str]) -> None:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        for path in left:
            writer.write(f"GET {path} HTTP/1.1\r\nHost: {address}\r\nAccept: {ACCEPT_MANIFESTS}\r\n\r\n".encode())
            await _read_answer(reader)
    finally:
        writer.transport.abort()


def check_image(peer: Peer, sample: Sample) -> PulledImage:
    """Pull a whole image, each digest and size checked, and see that its layers are the origin's.

    Raises AssertionError.
    """
    pulled = pull(peer.address, peer.repository_of(sample), sample.tag)
    layers = [layer["digest"] for layer in pulled.document["layers"]]
    assert layers == [layer["digest"] for layer in sample.layers], f"{peer.name} serves other layers"
    return pulled


# --- processes -------------------------------------------------------------------------------------------------------


def processor_s(pids: Iterable[int]) -> float:
    """Seconds that the processes have been running on a processor so far, in all; to a hundredth."""
    # After the name, which may hold anything, in parentheses.
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(each[11]) + int(each[12]) for each in fields) / os.sysconf("SC_CLK_TCK")


def resident(pids: Iterable[int]) -> int:
    """Bytes that the processes have resident now, in all."""
    return sum(_status(pid, "VmRSS") for pid in pids)


def touch_memory(size: int) -> None:
    """Make that many bytes of memory ready for whoever needs them next.

    A virtual machine's memory comes from its host when it is first written, which takes ten times as long as the write.
    """
    mmap(-1, size, flags=MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE).close()


def socket_memory() -> int:
    """Bytes that the kernel holds for all TCP connections of this machine: what was sent and not read yet, mostly."""
    match = re.search(r"^TCP: .* mem (\d+)", Path("/proc/net/sockstat").read_text(), re.MULTILINE)
    assert match is not None, "/proc/net/sockstat does not tell"
    return int(match[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_resident(pids: Iterable[int]) -> int:
    """The sum of the most bytes that each process had resident since reset_peak()."""
    return sum(_status(pid, "VmHWM") for pid in pids)


def reset_peak(pids: Iterable[int]) -> None:
    """Count peaks from here on."""
    for pid in pids:
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def _status(pid: int, key: str) -> int:
    match = re.search(rf"{key}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert match is not None, f"/proc/{pid}/status has no {key}"
    return int(match[1]) * 1024

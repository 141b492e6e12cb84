"""For tests of builds: boxes on this machine, what runs in them, and whether there can be any."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from builder.box import Boxes, BoxUnavailable, Run
from builder.forward import Forward
from builder.gate import Gate
from builder.limits import Limits, Meter
from tests.patience import patience
from wave_proxy.upstream.egress import Egress

LIMITS = Limits(memory=2 * 10**9, processes=400, disk=10**9, log_bytes=10**6)
_PAUSE_S = 0.05
NO_PROXY = "http://127.0.0.1:9"  # where no wave-proxy is


@cache
def why_no_box() -> str:
    """Why this machine lets us make no boxes; empty when it does."""

    async def attempt() -> str:
        with TemporaryDirectory() as folder:
            try:
                status, said = await run_in_box(Path(folder), "true")
            except BoxUnavailable as err:
                return str(err)
        return "" if status == 0 else said

    return asyncio.run(attempt())


@asynccontextmanager
async def gate(*allowed: str, url: str = NO_PROXY, proxy: str = "") -> AsyncIterator[Gate]:
    """A gate that lets through to these private addresses, and to all others through ``proxy``."""
    egress = Egress({}, connect_timeout_s=5)
    try:
        yield Gate(egress, url, allowed, forward=Forward(egress, proxy) if proxy else None)
    finally:
        await egress.close()


async def run_in_box(folder: Path, script: str, *, limits: Limits = LIMITS, isolated: bool = True) -> tuple[int, str]:
    """The exit status and the output of a shell script in a box whose folder is ``folder``."""
    said = bytearray()
    async with gate() as way_out:
        boxes = Boxes(limits, way_out if isolated else None)
        meter = Meter(said.extend, limits.log_bytes)
        status = await boxes.run(Run(("sh", "-c", script), folder, meter, {}))
    return status, said.decode(errors="replace")


def processes_with(text: str) -> list[int]:
    """The ids of all processes of this machine whose command line holds ``text``."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                command = Path(f"/proc/{name}/cmdline").read_bytes().replace(b"\0", b" ")
            except OSError:
                continue
            if text.encode() in command:
                found.append(int(name))
    return found


async def until_gone(text: str) -> None:
    """Wait until no process has ``text`` in its command line. Raises TimeoutError."""
    async with patience():
        while await _look_for(text):
            await asyncio.sleep(_PAUSE_S)


async def until_there(text: str) -> None:
    """Wait until a process has ``text`` in its command line. Raises TimeoutError."""
    async with patience():
        while not await _look_for(text):
            await asyncio.sleep(_PAUSE_S)


async def _look_for(text: str) -> list[int]:
    """The event loop, on which the box needs its gate, has no time to read about all processes of a busy machine."""
    return await asyncio.to_thread(processes_with, text)

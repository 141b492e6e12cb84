"""A program that works for a job: with nothing of our environment, watched, and ended with the job or the builder."""

import asyncio
import os
import resource
import shutil
import signal
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from builder.failures import OUT_OF_MEMORY, BuildFailed
from builder.limits import disk_usage, usage
from builder.workspace import to_its_end
from wave_proxy.image.size import format_size

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_INTERVAL_S = 0.25
_DISK_INTERVAL_S = 2.0
_CHUNK_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a program may use: bytes of memory, of disk in its folder, and of what it writes for people to read."""

    memory: int
    disk: int
    output: int


@dataclass(frozen=True, slots=True)
class Child:
    """A program to run in a folder. ``name`` is what messages call it; ``log`` takes what it writes."""

    name: str
    argv: Sequence[str]
    folder: Path
    log: Callable[[bytes], None]
    environment: Mapping[str, str]


def find_program(name: str) -> str | None:
    """The path of a program; None when there is none."""
    return shutil.which(name, path=_PATH) or shutil.which(name)


async def run(child: Child, allowance: Allowance) -> int:
    """The program's exit status, 128 + n when signal n ended it. However this ends, nothing is left of the program.

    Raises BuildFailed when it takes more than it may, OSError when it can't be started.
    """
    process = await asyncio.create_subprocess_exec(
        *_tied(child.argv),
        cwd=child.folder,
        env={"PATH": _PATH, "HOME": str(child.folder), "TMPDIR": str(child.folder), **child.environment},
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=STDOUT,
        start_new_session=True,
    )
    watching = asyncio.create_task(_watch(process.pid, child, allowance))
    reading = asyncio.create_task(_read(process, child, allowance))
    try:
        _limit(process.pid, allowance)
        await asyncio.wait({watching, reading}, return_when=asyncio.FIRST_COMPLETED)
        if watching.done():
            raise watching.result()
        reading.result()
        status = await process.wait()
        return status if status >= 0 else 128 - status
    finally:
        watching.cancel()
        reading.cancel()
        await asyncio.gather(watching, reading, return_exceptions=True)
        await to_its_end(asyncio.create_task(_end(process)))


def _tied(argv: Sequence[str]) -> list[str]:
    """The command whose process ends with ours, and gains no rights by what it runs."""
    setpriv = find_program("setpriv")
    return [setpriv, "--pdeathsig", "KILL", "--no-new-privs", *argv] if setpriv else list(argv)


def _limit(pid: int, allowance: Allowance) -> None:
    with suppress(ProcessLookupError):  # it has ended already
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (allowance.disk, allowance.disk))
        resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))


async def _read(process: Process, child: Child, allowance: Allowance) -> None:
    assert process.stdout is not None  # noqa: S101
    left = allowance.output
    while chunk := await process.stdout.read(_CHUNK_BYTES):
        child.log(chunk[:left])
        left -= len(chunk)
        if left < 0:
            raise BuildFailed(f"{child.name} wrote more than {format_size(allowance.output)} into the log")


async def _watch(pid: int, child: Child, allowance: Allowance) -> BuildFailed:
    """The failure, as soon as there is too much of something; for ever when there is not."""
    loop = asyncio.get_running_loop()
    walk_at = loop.time() + _DISK_INTERVAL_S
    while True:
        used = await asyncio.to_thread(usage, pid)
        if used.memory > allowance.memory:
            return BuildFailed(
                f"out of memory: {child.name} used its limit of {format_size(allowance.memory)}; raise [build] memory",
                OUT_OF_MEMORY,
            )
        if loop.time() >= walk_at:
            walk_at = loop.time() + _DISK_INTERVAL_S
            if await asyncio.to_thread(disk_usage, child.folder) > allowance.disk:
                limit = format_size(allowance.disk)
                return BuildFailed(f"no space: {child.name} used its limit of {limit} of disk; raise [build] disk")
        await asyncio.sleep(_INTERVAL_S)


async def _end(process: Process) -> None:
    """End all that it has started, and wait for that."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    assert process.stdout is not None  # noqa: S101
    while await process.stdout.read(_CHUNK_BYTES):
        pass  # the pipe has to be empty to be closed
    await process.wait()

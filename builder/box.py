"""Runs a program in a box: namespaces of its own, the system's programs read-only, one folder, a gate as the way out.

What happens on the other side is in ``inside.py``. All in a box ends with the program, with the task that runs it, and
with the builder, however that ends.
"""

import asyncio
import json
import os
import resource
import shutil
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from builder.cgroup import Cgroup, Kind, Parent, find_parents, remove_leftovers
from builder.gate import Gate, Writable
from builder.ids import Ids, IdsMissing, find_ids
from builder.limits import Limits, Meter, Watchdog

HOME = Path("/build")  # the folder of a build inside of its box
SECRET = "/proc/1/fd/100"  # noqa: S105 - where a box's program reads the secret of its run

_INSIDE = Path(__file__).with_name("inside.py")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_START_S = 30.0
_END_S = 20.0
_CHUNK_BYTES = 64 << 10
_MESSAGE_BYTES = 1 << 16
_MAX_SOCKETS = 64
SPARE_PROCESSES = 1000  # the kernel stops a build there if we are too slow
_OPEN_FILES = 65_536

log = structlog.get_logger()


class BoxUnavailable(Exception):
    """This machine does not let us make a box; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class Run:
    """One program to run. ``folder`` is all that it can write to; ``log`` takes what it writes.

    ``writable`` is the repository on wave-proxy that it may push to, ``registry`` another registry that it needs.
    ``secret`` is for the program, at SECRET: in no file, and not to be read by what it runs with fewer capabilities.
    """

    argv: Sequence[str]
    folder: Path
    log: Meter
    environment: Mapping[str, str]
    writable: Writable | None = None
    registry: str = ""
    secret: str = field(default="", repr=False)


class Boxes:
    """Makes boxes with these limits. Without a ``gate`` they have the machine's network, and ``variables`` about it."""

    def __init__(self, limits: Limits, gate: Gate | None, variables: Mapping[str, str] | None = None) -> None:
        self._limits = limits
        self._gate = gate
        self._variables = variables or {}
        self._parents: tuple[Parent, ...] | None = None
        self._warned = False

    def environment(self, more: Mapping[str, str]) -> dict[str, str]:
        """The environment of a program: nothing of the builder's own."""
        proxy = self._gate.environment if self._gate else self._variables
        return {"PATH": _PATH, "HOME": str(HOME), "LANG": "C.UTF-8", **proxy, **more}

    async def run(self, run: Run) -> int:
        """The program's exit status, 128 + n when signal n ended it.

        Raises BuildFailed when it exceeds a limit, BoxUnavailable when this machine does not let us make a box.
        """
        parents = await self._find_parents()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            ours.setblocking(False)
            with theirs:
                process = await _start(theirs)
            box = _Box(self._limits, run, process, ours)
            try:
                return await box.run(self._plan(run), self._gate, parents, self._warn)
            except (OSError, IdsMissing) as err:
                why = getattr(err, "strerror", None) or err
                raise BoxUnavailable(f"a build can't be shut in on this machine: {why}{_hint(err)}") from err

    def _plan(self, run: Run) -> dict[str, object]:
        program = shutil.which(run.argv[0], path=_PATH) or shutil.which(run.argv[0]) or ""
        elsewhere = [program] if program and not program.startswith(("/usr/", "/bin/", "/sbin/")) else []
        return {
            "argv": [program or run.argv[0], *run.argv[1:]],
            "environment": self.environment(run.environment),
            "isolated": self._gate is not None,
            "listen": self._gate.listen if self._gate else [],
            "programs": elsewhere,
            "folder": str(run.folder.resolve()),
            "home": str(HOME),
            "secret": run.secret,
            "secret_fd": int(SECRET.rpartition("/")[2]),
            "limits": {
                "RLIMIT_NPROC": _at_most(resource.RLIMIT_NPROC, self._limits.processes + SPARE_PROCESSES),
                "RLIMIT_FSIZE": _at_most(resource.RLIMIT_FSIZE, self._limits.disk),
                "RLIMIT_NOFILE": _at_most(resource.RLIMIT_NOFILE, _OPEN_FILES),
                "RLIMIT_CORE": 0,
            },
        }

    async def _find_parents(self) -> tuple[Parent, ...]:
        if self._parents is None:
            self._parents = find_parents()
        await remove_leftovers(self._parents)
        return self._parents

    def _warn(self) -> None:
        if not self._warned:
            self._warned = True
            log.warning(
                "this machine gives us no user namespaces, so builds run as its root, shut in by chroot alone; "
                "raise the sysctl user.max_user_namespaces"
            )


class _Box:
    """One box from its first process to its end."""

    def __init__(self, limits: Limits, run: Run, process: Process, control: socket.socket) -> None:
        self._limits = limits
        self._run = run
        self._process = process
        self._control = control

    async def run(
        self, plan: Mapping[str, object], gate: Gate | None, parents: tuple[Parent, ...], warn: Callable[[], None]
    ) -> int:
        """See Boxes.run. Raises OSError and IdsMissing when there can be no box."""
        limits: dict[Kind, int] = {"memory": self._limits.memory, "processes": self._limits.processes}
        cgroup = Cgroup.create(parents, str(self._process.pid), limits)
        try:
            self._control.send(json.dumps(plan).encode())
            async with asyncio.timeout(_START_S):
                sockets = await self._prepare(cgroup, warn)
            async with AsyncExitStack() as stack:
                for item in sockets:
                    stack.callback(item.close)
                if gate is not None:
                    await stack.enter_async_context(
                        gate.serve(sockets, self._run.log.note, self._run.writable, self._run.registry)
                    )
                self._control.send(b"go")
                await self._watch(cgroup)
                return await self._status()
        finally:
            await asyncio.shield(self._clean_up(cgroup))

    async def _clean_up(self, cgroup: Cgroup) -> None:
        await _end(self._process)
        await cgroup.remove()

    async def _prepare(self, cgroup: Cgroup, warn: Callable[[], None]) -> list[socket.socket]:
        """Bring the first process to where it waits for "go"; the sockets that listen in the box."""
        pid = self._process.pid
        said = await self._receive()
        if said == "unshared":
            ids = find_ids()
            await ids.map(pid)
            await asyncio.to_thread(_give_to, self._run.folder, ids)
        else:
            warn()
        cgroup.add(pid)
        self._control.send(b"mapped")
        fds: list[int] = []
        await self._receive(fds)
        return [socket.socket(fileno=fd) for fd in fds]

    async def _receive(self, fds: list[int] | None = None) -> str:
        """The next message; its file descriptors are added to ``fds``. Raises OSError with what the box says."""
        loop = asyncio.get_running_loop()
        readable: asyncio.Future[None] = loop.create_future()
        loop.add_reader(self._control, _wake, readable)
        try:
            await readable
        finally:
            loop.remove_reader(self._control)
        text, received, _, _ = socket.recv_fds(self._control, _MESSAGE_BYTES, _MAX_SOCKETS)
        if fds is not None:
            fds += received
        if not text:
            raise OSError("its first process ended before it ran anything")
        _raise_failure(text)
        return text.decode()

    async def _watch(self, cgroup: Cgroup) -> None:
        """Wait for the end of the program. Raises BuildFailed when it exceeds a limit."""
        watchdog = Watchdog(self._limits, cgroup, self._process.pid, self._run.folder)
        watching = asyncio.create_task(watchdog.watch())
        reading = asyncio.create_task(self._read_log())
        try:
            await asyncio.wait({watching, reading}, return_when=asyncio.FIRST_COMPLETED)
            if watching.done():
                raise watching.result()
            reading.result()
            if failure := watchdog.verdict():
                raise failure
        finally:
            for task in (watching, reading):
                task.cancel()
            await asyncio.gather(watching, reading, return_exceptions=True)

    async def _read_log(self) -> None:
        assert self._process.stdout is not None  # noqa: S101
        while chunk := await self._process.stdout.read(_CHUNK_BYTES):
            self._run.log.write(chunk)

    async def _status(self) -> int:
        status = await self._process.wait()
        with suppress(BlockingIOError):
            _raise_failure(self._control.recv(_MESSAGE_BYTES))
        return status if status >= 0 else 128 - status


async def _start(control: socket.socket) -> Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-I",
        str(_INSIDE),
        str(control.fileno()),
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=STDOUT,
        pass_fds=(control.fileno(),),
        env={"PATH": _PATH},
        cwd="/",
        start_new_session=True,
    )


async def _end(process: Process) -> None:
    """End a box, and wait until nothing of it is left."""
    gone = asyncio.gather(process.wait(), _drain(process))
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.send_signal(number)
        with suppress(TimeoutError):
            async with asyncio.timeout(_END_S):
                await asyncio.shield(gone)
                return


async def _drain(process: Process) -> None:
    """Throw away what is left of the log: its pipe has to be empty to be closed."""
    while process.stdout is not None and await process.stdout.read(_CHUNK_BYTES):
        pass


def _hint(err: Exception) -> str:
    if not isinstance(err, PermissionError):
        return ""
    if os.geteuid() == 0:
        return "; a container needs the capability SYS_ADMIN (docker run --privileged) for it"
    return (
        "; user namespaces have to be allowed to users: look at the sysctls user.max_user_namespaces, "
        "kernel.unprivileged_userns_clone and kernel.apparmor_restrict_unprivileged_userns, or run the builder as root"
    )


def _raise_failure(message: bytes) -> None:
    if message.startswith(b"failed "):
        _, number, text = message.decode(errors="replace").split(" ", 2)
        raise OSError(int(number), text)


def _wake(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_result(None)


def _at_most(kind: int, limit: int) -> int:
    hard = resource.getrlimit(kind)[1]
    return limit if hard == resource.RLIM_INFINITY else min(limit, hard)


def _give_to(folder: Path, ids: Ids) -> None:
    """Make a folder, and all that the builder has put into it, the property of the box's root."""
    user, group = ids.root
    if user == os.geteuid() or os.stat(folder).st_uid == user:
        return
    for _, folders, files, opened in os.fwalk(folder):
        for name in (*folders, *files):
            os.chown(name, user, group, dir_fd=opened, follow_symlinks=False)
    os.chown(folder, user, group)

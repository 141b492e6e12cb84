"""What one build may use: memory, processes, disk and log. Who runs a build ends it when one of these is exceeded."""

import asyncio
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from re import compile as compile_pattern

from builder.cgroup import Cgroup, Kind
from builder.failures import OUT_OF_MEMORY, BuildFailed
from wave_proxy.image.size import format_size

# A build fills memory at some GB a second: what it gets beyond its limit is what it can in this time.
_PROCESSES_INTERVAL_S = 0.1
_DISK_INTERVAL_S = 0.5
_DISK_WALK_INTERVAL_S = 15.0
_TAIL_BYTES = 64 << 10
_MIN_FREE_BYTES = 512 << 20
_MIN_FREE_FILES = 0.02  # of all that the file system can have
_LEAST_BYTES = 4096  # an empty file counts for: it takes one of a limited number
_KINDS: frozenset[Kind] = frozenset(("memory", "processes"))
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_MUCH_SHARED_BYTES = 32 << 20
_OCTAL = compile_pattern(rb"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one build: bytes of memory, processes and threads, bytes of disk, bytes of log."""

    memory: int
    processes: int
    disk: int
    log_bytes: int


def exceeded(kind: Kind, limits: Limits) -> BuildFailed:
    """The failure of a build that ran into its limit of memory or processes."""
    if kind == "memory":
        return BuildFailed(
            f"out of memory: the build used its limit of {format_size(limits.memory)}; build with fewer jobs at once, "
            "or raise [build] memory",
            OUT_OF_MEMORY,
        )
    return BuildFailed(
        f"too many processes: the build reached its limit of {limits.processes} processes and threads; build with "
        "fewer jobs at once, or raise [build] processes"
    )


class Meter:
    """Lets a build's log through as long as it is within its limit."""

    def __init__(self, sink: Callable[[bytes], None], limit: int) -> None:
        self._sink = sink
        self._left = limit
        self._limit = limit

    def note(self, text: bytes) -> None:
        """Pass on what is within the limit."""
        if self._left > 0:
            self._sink(text[: self._left])
        self._left -= len(text)

    def write(self, text: bytes) -> None:
        """Pass on what is within the limit. Raises BuildFailed for the rest."""
        self.note(text)
        if self._left < 0:
            raise BuildFailed(
                f"log too large: the build wrote more than its limit of {format_size(self._limit)}; make it write "
                "less, or raise [build] log_bytes"
            )


class Tail:
    """Hands a build's log on, and remembers its end."""

    def __init__(self, sink: Callable[[bytes], None]) -> None:
        self._sink = sink
        self._kept = b""

    @property
    def text(self) -> str:
        """The last 64 KiB."""
        return self._kept.decode(errors="replace")

    def write(self, text: bytes) -> None:
        """Hand on and remember."""
        self._kept = (self._kept + text)[-_TAIL_BYTES:]
        self._sink(text)


class Watchdog:
    """Looks after one box from outside. ``pid`` is the box's first process, ``folder`` its workspace."""

    def __init__(self, limits: Limits, cgroup: Cgroup, pid: int, folder: Path) -> None:
        self._limits = limits
        self._cgroup = cgroup
        self._pid = pid
        self._folder = folder

    async def watch(self) -> BuildFailed:
        """The failure, as soon as a limit is exceeded; for ever when none is."""
        tasks = [asyncio.create_task(self._watch_processes()), asyncio.create_task(self._watch_disk())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return next(iter(done)).result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def verdict(self) -> BuildFailed | None:
        """The limit that the build ran into, if it did, once it has ended."""
        kind = self._cgroup.reached()
        return exceeded(kind, self._limits) if kind else None

    async def _watch_processes(self) -> BuildFailed:
        unlimited = _KINDS - self._cgroup.limited
        while True:
            failure = self.verdict()
            if failure is None and unlimited:
                used = await asyncio.to_thread(usage, self._pid)
                failure = self._judge(used, unlimited)
            if failure is not None:
                return failure
            await asyncio.sleep(_PROCESSES_INTERVAL_S)

    def _judge(self, used: "Usage", unlimited: frozenset[Kind]) -> BuildFailed | None:
        if "memory" in unlimited and used.memory >= self._limits.memory:
            return exceeded("memory", self._limits)
        if "processes" in unlimited and used.processes >= self._limits.processes:
            return exceeded("processes", self._limits)
        return None

    async def _watch_disk(self) -> BuildFailed:
        """Walks when the file system has lost much since the last walk, and now and then: files are also removed."""
        loop = asyncio.get_running_loop()
        start, walked = loop.time(), _free(self._folder)
        while True:
            await asyncio.sleep(_DISK_INTERVAL_S)
            free = _free(self._folder)
            if free < _MIN_FREE_BYTES:
                return BuildFailed(
                    f"no space: the builder's disk has only {format_size(free)} left; free some, or give it more"
                )
            if (files := _free_files(self._folder)) < _MIN_FREE_FILES:
                return BuildFailed(
                    f"no space: the builder's disk can have only {files:.1%} of its files more; remove some"
                )
            if walked - free > self._limits.disk // 20 or loop.time() - start > _DISK_WALK_INTERVAL_S:
                if await asyncio.to_thread(disk_usage, self._folder) > self._limits.disk:
                    return too_much_disk(self._limits)
                start, walked = loop.time(), free


def too_much_disk(limits: Limits) -> BuildFailed:
    """The failure of a build that filled its workspace."""
    return BuildFailed(
        f"no space: the build used more than its limit of {format_size(limits.disk)} of disk; install less, or raise "
        "[build] disk"
    )


def _free_files(folder: Path) -> float:
    """Which part of the files that its file system can have are not there yet; 1 when it has no such limit."""
    status = os.statvfs(folder)
    return status.f_favail / status.f_files if status.f_files else 1.0


def _free(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes of memory, number of processes and threads."""

    memory: int
    processes: int


def usage(pid: int) -> Usage:
    """What a process and all its descendants use: memory without what is shared with files on disk."""
    parents, threads = _processes()
    family = {pid}
    grown = True
    while grown:
        found = {child for child, parent in parents.items() if parent in family} - family
        family |= found
        grown = bool(found)
    # What is mapped may be of a file system in memory: the same pages are not counted twice.
    shared = max(sum(map(_shared_bytes, family)), _bytes_in_memory_files(family))
    return Usage(sum(map(_private_bytes, family)) + shared, sum(threads.get(member, 0) for member in family))


def _processes() -> tuple[dict[int, int], dict[int, int]]:
    """The parent and the number of threads of every process."""
    parents, threads = {}, {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (text := _read(f"/proc/{name}/stat")):
            fields = text.rpartition(b")")[2].split()  # the name before may hold anything
            parents[int(name)], threads[int(name)] = int(fields[1]), int(fields[17])
    return parents, threads


def _private_bytes(pid: int) -> int:
    fields = _read(f"/proc/{pid}/statm").split()
    return (int(fields[1]) - int(fields[2])) * _PAGE_BYTES if fields else 0


def _shared_bytes(pid: int) -> int:
    """The process's part of the memory that it shares with others; 0 when that is little, as it takes long to tell."""
    fields = _read(f"/proc/{pid}/statm").split()
    if not fields or int(fields[2]) * _PAGE_BYTES < _MUCH_SHARED_BYTES:
        return 0
    lines = (line.split() for line in _read(f"/proc/{pid}/smaps_rollup").splitlines())
    return sum(int(words[1]) << 10 for words in lines if words[0] == b"Pss_Shmem:")


def _bytes_in_memory_files(pids: Iterable[int]) -> int:
    """What is stored in file systems that are in memory, and that these processes have and we don't."""
    known = {device for device, _ in _memory_mounts(os.getpid())}
    namespaces, total = set(), 0
    for pid in pids:
        with suppress(OSError):  # it has just ended
            namespace = os.readlink(f"/proc/{pid}/ns/mnt")
            if namespace in namespaces:
                continue
            namespaces.add(namespace)
            for device, place in _memory_mounts(pid):
                if device not in known:
                    known.add(device)
                    total += stored_bytes(device, place)
    return total


def stored_bytes(device: bytes, place: bytes) -> int:
    """What a file system holds; 0 when another one is found there: the process has another root now. Raises OSError."""
    opened = os.open(place, os.O_PATH | os.O_CLOEXEC)
    try:
        major, minor = map(int, device.split(b":"))
        status = os.fstatvfs(opened)
        held = (status.f_blocks - status.f_bfree) * status.f_frsize
        return held if os.fstat(opened).st_dev == os.makedev(major, minor) else 0
    finally:
        os.close(opened)


def _memory_mounts(pid: int) -> Iterator[tuple[bytes, bytes]]:
    """The device and the place, as we reach it, of each tmpfs that a process sees. Source: proc_pid_mountinfo(5)."""
    for line in _read(f"/proc/{pid}/mountinfo").splitlines():
        fields, _, kind = line.partition(b" - ")
        if kind.startswith(b"tmpfs "):
            place = _OCTAL.sub(lambda match: bytes((int(match[1], 8),)), fields.split(b" ")[4])
            yield fields.split(b" ")[2], b"/proc/%d/root%b" % (pid, place)


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:  # it has just ended
        return b""


def disk_usage(folder: Path) -> int:
    """Bytes on disk below a folder; files that are linked several times count once. What can't be read is left out."""
    total, seen, waiting = 0, set(), [str(folder)]
    while waiting:
        try:
            entries = os.scandir(waiting.pop())
        except OSError:
            continue
        with entries:
            for entry in entries:
                try:
                    status = entry.stat(follow_symlinks=False)
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                except OSError:
                    continue
                if status.st_nlink > 1 and not entry.is_dir(follow_symlinks=False):
                    if status.st_ino in seen:
                        continue
                    seen.add(status.st_ino)
                total += max(status.st_blocks * 512, _LEAST_BYTES)
    return total

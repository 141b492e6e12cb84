"""A cgroup for each build, where this process has been given the right to make some: version 2, or the old hierarchies.

A cgroup manager such as systemd owns the tree. What it hands over it marks (``Delegate=yes``), and a container or a
machine without a manager starts in the root ``/`` that it sees. Anywhere else we make nothing.
"""

import asyncio
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Kind = Literal["memory", "processes"]

_PREFIX = "wave-proxy-build"
_REMOVAL_ATTEMPTS = 40
_REMOVAL_PAUSE_S = 0.05


@dataclass(frozen=True, slots=True)
class _Controller:
    """One limit: the file that takes it, files that go with it, and the counter that says that it was reached."""

    kind: Kind
    name: str
    limit_file: str
    others: tuple[tuple[str, str], ...]
    events_file: str
    event: str


_PIDS = _Controller("processes", "pids", "pids.max", (), "pids.events", "max")
_MEMORY = _Controller(
    "memory", "memory", "memory.max", (("memory.swap.max", "0"), ("memory.oom.group", "1")), "memory.events", "oom_kill"
)
_MEMORY_V1 = _Controller("memory", "memory", "memory.limit_in_bytes", (), "memory.oom_control", "oom_kill")


@dataclass(frozen=True, slots=True)
class Parent:
    """A folder of the cgroup file system in which we may make cgroups, and what they can limit."""

    folder: Path
    controllers: tuple[_Controller, ...]


@dataclass(slots=True)
class Cgroup:
    """The cgroup of one build, or one in each of several hierarchies; none at all when there are no parents."""

    folders: list[Path] = field(default_factory=list)
    limited: set[Kind] = field(default_factory=set)
    _events: list[tuple[Kind, Path, str]] = field(default_factory=list)

    @classmethod
    def create(cls, parents: tuple[Parent, ...], name: str, limits: dict[Kind, int]) -> "Cgroup":
        """An empty cgroup with these limits; ``limited`` says which of them it keeps."""
        made = cls()
        for parent in parents:
            folder = parent.folder / f"{_PREFIX}-{os.getpid()}-{name}"
            with suppress(OSError):
                folder.mkdir()
                made.folders.append(folder)
                for controller in parent.controllers:
                    made._limit(folder, controller, limits[controller.kind])
        return made

    def _limit(self, folder: Path, controller: _Controller, limit: int) -> None:
        (folder / controller.limit_file).write_text(str(limit))
        for file, text in controller.others:
            with suppress(OSError):  # a kernel without swap accounting
                (folder / file).write_text(text)
        self.limited.add(controller.kind)
        self._events.append((controller.kind, folder / controller.events_file, controller.event))

    def add(self, pid: int) -> None:
        """Put a process into it; all that it starts from now on belongs to it, too. Raises OSError."""
        for folder in self.folders:
            (folder / "cgroup.procs").write_text(str(pid))

    def reached(self) -> Kind | None:
        """A limit that the build has run into: a process of it was killed, or could not be started."""
        for kind, file, event in self._events:
            with suppress(OSError):
                counters = dict(line.split() for line in file.read_text().splitlines())
                if int(counters.get(event, "0")) > 0:
                    return kind
        return None

    async def remove(self) -> None:
        """Remove it; all processes in it have ended or are about to."""
        for folder in self.folders:
            for _ in range(_REMOVAL_ATTEMPTS):
                try:
                    folder.rmdir()
                    break
                except FileNotFoundError:
                    break
                except OSError:
                    await asyncio.sleep(_REMOVAL_PAUSE_S)


def find_parents(proc: Path = Path("/proc")) -> tuple[Parent, ...]:
    """Where this process may make cgroups; empty when nowhere."""
    mounts = [line.split() for line in (proc / "self" / "mounts").read_text().splitlines()]
    return tuple(_parents((proc / "self" / "cgroup").read_text().splitlines(), mounts))


def _parents(memberships: list[str], mounts: list[list[str]]) -> Iterator[Parent]:
    for line in memberships:
        _, names, path = line.split(":", 2)
        if not names:
            roots = [mount[1] for mount in mounts if mount[2] == "cgroup2"]
            yield from (parent for root in roots[:1] if (parent := _parent_v2(root, path)))
            continue
        for controller in (_MEMORY_V1, _PIDS):
            if controller.name in names.split(","):
                roots = [
                    mount[1] for mount in mounts if mount[2] == "cgroup" and controller.name in mount[3].split(",")
                ]
                folders = [Path(root + path) for root in roots[:1]]
                yield from (Parent(folder, (controller,)) for folder in folders if _is_ours(folder, path))


def _parent_v2(root: str, path: str) -> Parent | None:
    own = Path(root + path)
    # A cgroup with processes of its own has no limited children, so a manager may have put us into a subgroup of ours.
    for folder, place in ((own, path), (own.parent, "")):
        if not _is_ours(folder, place):
            continue
        with suppress(OSError):
            enabled = folder / "cgroup.subtree_control"
            if not {"memory", "pids"} <= set(enabled.read_text().split()):
                enabled.write_text("+memory +pids")
            return Parent(folder, (_MEMORY, _PIDS))
    return None


def _is_ours(folder: Path, path: str) -> bool:
    if not os.access(folder, os.W_OK):
        return False
    if path == "/":
        return True
    for name in ("trusted.delegate", "user.delegate"):
        with suppress(OSError):
            return os.getxattr(folder, name) == b"1"
    return False


async def remove_leftovers(parents: tuple[Parent, ...]) -> None:
    """Remove the cgroups of killed builders; the processes in them may still be on their way out."""
    folders = [folder for parent in parents for folder in parent.folder.glob(f"{_PREFIX}-*") if not _has_owner(folder)]
    await asyncio.gather(*(Cgroup([folder]).remove() for folder in folders))


def _has_owner(folder: Path) -> bool:
    owner = folder.name.removeprefix(f"{_PREFIX}-").partition("-")[0]
    try:
        stat = Path(f"/proc/{owner}/stat").read_text()
    except OSError:
        return False
    return not stat.rpartition(")")[2].lstrip().startswith("Z")  # dead, and nobody has taken note of it yet

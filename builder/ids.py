"""User ids of boxes: root in a box, and 65535 others, are nobody in particular on the machine."""

import asyncio
import os
import pwd
from dataclasses import dataclass
from pathlib import Path

_FIRST_ID = 100_000
_COUNT = 65_536
_LEAST_COUNT = 1_000


class IdsMissing(Exception):
    """There are no user ids for a box; the text says how to give some."""


@dataclass(frozen=True, slots=True)
class Extent:
    """``count`` ids from ``inside`` on in a box, which are those from ``outside`` on for the builder."""

    inside: int
    outside: int
    count: int

    def __str__(self) -> str:
        return f"{self.inside} {self.outside} {self.count}"


@dataclass(frozen=True, slots=True)
class Ids:
    """The users and groups of a box. ``helpers``: the kernel lets only newuidmap and newgidmap set them."""

    users: tuple[Extent, ...]
    groups: tuple[Extent, ...]
    helpers: bool

    @property
    def root(self) -> tuple[int, int]:
        """User and group that a box's root is for the builder."""
        return self.users[0].outside, self.groups[0].outside

    async def map(self, pid: int) -> None:
        """Give them to the user namespace of a process that has just made it. Raises OSError."""
        for kind, extents in (("uid", self.users), ("gid", self.groups)):
            if self.helpers:
                await _run_helper(f"new{kind}map", pid, extents)
            else:
                _write_map(Path(f"/proc/{pid}/{kind}_map"), extents)


def _write_map(file: Path, extents: tuple[Extent, ...]) -> None:
    file.write_text("".join(f"{extent}\n" for extent in extents))


async def _run_helper(program: str, pid: int, extents: tuple[Extent, ...]) -> None:
    words = [word for extent in extents for word in str(extent).split()]
    helper = await asyncio.create_subprocess_exec(program, str(pid), *words, stderr=asyncio.subprocess.PIPE)
    _, said = await helper.communicate()
    if helper.returncode != 0:
        raise OSError(f"{program}: {said.decode(errors='replace').strip()}")


def find_ids() -> Ids:
    """The ids that this process may give to a box. Raises IdsMissing."""
    if os.geteuid() == 0:
        return Ids((_of_root("uid"),), (_of_root("gid"),), helpers=False)
    return Ids(_of_user("uid", os.geteuid()), _of_user("gid", os.getegid()), helpers=True)


def _of_root(kind: str) -> Extent:
    """From 100000 on, where there are so many; in a container with fewer, the most that it has but its own root."""
    lines = Path(f"/proc/self/{kind}_map").read_text().splitlines()
    have = [(int(first), int(count)) for first, _, count in map(str.split, lines)]
    if any(first <= _FIRST_ID and first + count >= _FIRST_ID + _COUNT for first, count in have):
        return Extent(0, _FIRST_ID, _COUNT)
    usable = [(min(first + count - max(first, 1), _COUNT), max(first, 1)) for first, count in have]
    count, first = max(usable)
    if count < _LEAST_COUNT:
        raise IdsMissing(f"root has only {count} {kind}s here for builds: give this container a range of 65536 ids")
    return Extent(0, first, count)


def _of_user(kind: str, own: int) -> tuple[Extent, ...]:
    file = Path(f"/etc/sub{kind}")
    names = {str(os.geteuid()), pwd.getpwuid(os.geteuid()).pw_name} if _has_name() else {str(os.geteuid())}
    lines = file.read_text().splitlines() if file.exists() else []
    ranges = [line.split(":") for line in lines if line.partition(":")[0] in names and line.count(":") == 2]
    usable = [(int(first), int(count)) for _, first, count in ranges if int(count) >= _LEAST_COUNT]
    if not usable:
        name = max(names)
        raise IdsMissing(
            f"{file} gives the user {name} no ids for builds: add the line {name}:{_FIRST_ID}:{_COUNT} as root, "
            "or run the builder as root"
        )
    first, count = usable[0]
    return Extent(0, own, 1), Extent(1, first, min(count, _COUNT))


def _has_name() -> bool:
    try:
        pwd.getpwuid(os.geteuid())
    except KeyError:
        return False
    return True

"""What the pages of builds, mirrors and scans have in common: ids, states, logs."""

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime
from re import compile as compile_pattern
from typing import Any
from urllib.parse import quote

from api.pages.formats import format_time
from wave_proxy.image.build import BuildRecord, split_build_id
from wave_proxy.state.builds import BuildStore

MAX_LOG_BYTES = 100_000
MAX_LISTED = 100

_DASHED = compile_pattern(r"(.+)-([0-9]+)")
_WHOLE_SERIES = compile_pattern(r"(?:(?:bd|mr|sc)-)?[0-9a-f]{16}")
_SERIES = compile_pattern(r"(?:(?:bd|mr|sc)-)?[0-9a-z-]{14,16}")


@dataclass(frozen=True, slots=True)
class State:
    """How far a job is: ``kind`` is how it looks."""

    kind: str
    text: str


WAITING = State("going", "Waiting")
RUNNING = State("going", "Running")
SUCCEEDED = State("good", "Succeeded")
FAILED = State("bad", "Failed")


@dataclass(frozen=True, slots=True)
class Log:
    """The end of a log: ``text`` begins ``cut`` bytes behind its beginning; all of it has ``size``."""

    text: str
    cut: int
    size: int
    href: str


def numbered(job_id: str) -> str | None:
    """The id with ``_<n>`` for one that has ``-<n>``, as file names and links have it; None for any other.

    An id without a number, all of whose digits happen to be decimal, is no such id. Source: ``wave.md`` V37.
    """
    match = _DASHED.fullmatch(job_id)
    return f"{match[1]}_{match[2]}" if match and not _WHOLE_SERIES.fullmatch(job_id) else None


def is_series(job_id: str) -> bool:
    """Whether the id's number is missing. Source: ``wave.md`` V37."""
    return _SERIES.fullmatch(job_id) is not None


def path_of(kind: str, job_id: str) -> str:
    """Where the page of a job is; ``kind`` is ``builds``, ``mirrors`` or ``scans``."""
    return f"/view/{kind}/{quote(job_id, safe='')}"


def state_of(job: BuildRecord) -> State:
    """How far a job is."""
    match job.phase, job.succeeded:
        case "queued", _:
            return WAITING
        case "running", _:
            return RUNNING
        case _, True:
            return SUCCEEDED
        case _:
            return FAILED


async def find_series(store: BuildStore, series: str) -> list[BuildRecord]:
    """The last jobs of a series, the newest first; those that are not kept any more are left out."""
    newest = await store.newest(series)
    parts = split_build_id(newest.build_id) if newest else None
    if newest is None or parts is None:
        return []
    numbers = range(parts[1] - 1, max(parts[1] - MAX_LISTED, 0), -1)
    others = await asyncio.gather(*(store.find(f"{series}_{number}") for number in numbers))
    return [newest, *(one for one in others if one)]


def entry_of(kind: str, job: BuildRecord) -> dict[str, Any]:
    """A job in a list of jobs."""
    time = format_time(datetime.fromtimestamp(job.created, UTC))
    return {"id": job.build_id, "href": path_of(kind, job.build_id), "state": state_of(job), "time": time}


def inspect_path(image: str) -> str:
    """Where the page is that inspects an image; empty for a Singularity image, which is no container image."""
    return "" if image.startswith("oras://") else f"/view/inspect?image={quote(image, safe='')}"


def end_of_log(content: bytes, href: str) -> Log:
    """What a page shows of a log: at most its last 100,000 bytes, from the beginning of a line on if there is one."""
    start = max(len(content) - MAX_LOG_BYTES, 0)
    if start and (line := content.find(b"\n", start)) >= 0:
        start = line + 1
    return Log(content[start:].decode(errors="replace"), start, len(content), href)

"""What the pages of builds, mirrors and scans have in common: ids, states, logs."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from re import compile as compile_pattern
from typing import Any
from urllib.parse import quote

from starlette.responses import RedirectResponse, Response

from api.endpoints import HTML, Answer
from api.pages.formats import format_time
from api.pages.render import Fact, fact, message, page
from wave_proxy.image.build import PREFIXES, BuildRecord, Kind, split_build_id
from wave_proxy.state.builds import BuildStore

MAX_LOG_BYTES = 100_000
MAX_LISTED = 100

JOB_ANSWERS: Mapping[int, Answer] = {
    200: Answer("The job; for an id without a number, a list of those with one.", media_types=(HTML,)),
    301: Answer("To the same with `_` before the number.", headers={"Location": "The page."}),
    307: Answer("To the only one there is.", headers={"Location": "The page."}),
}

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


def unknown(kind: Kind, text: str, status: int = 200) -> Response:
    """The page for an id that no job has, which ``text`` says. Source for the status: ``wave.md`` §11.1."""
    hint = (
        f"The id may be mistyped. Or the {kind} is too old: {kind}s are kept for a while after they were asked for, "
        "which the operator sets with `[build] log_retention`."
    )
    return message(f"Unknown {kind}", text, status, hint=hint)


def numbered(job_id: str) -> str | None:
    """The id with ``_<n>`` for one that has ``-<n>``, as file names and links have it; None for any other.

    An id without a number, all of whose digits happen to be decimal, is no such id. Source: ``wave.md`` V37.
    """
    match = _DASHED.fullmatch(job_id)
    return f"{match[1]}_{match[2]}" if match and not _WHOLE_SERIES.fullmatch(job_id) else None


def is_series(job_id: str) -> bool:
    """Whether the id's number is missing. Source: ``wave.md`` V37."""
    return _SERIES.fullmatch(job_id) is not None


def path_of(kind: Kind, job_id: str) -> str:
    """Where the page of a job is."""
    return f"/view/{kind}s/{quote(job_id, safe='')}"


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


async def locate(store: BuildStore, kind: Kind, asked: str) -> BuildRecord | Response | None:
    """The job that an address is about, or where it leads instead: to the whole id, or a list of jobs; None for none.

    The id may be without what all ids of that kind begin with. Raises StateUnavailable.
    """
    if whole := numbered(asked):
        return RedirectResponse(path_of(kind, whole), 301)
    prefix = PREFIXES[kind]
    job_id = asked if asked.startswith(f"{prefix}-") else f"{prefix}-{asked}"
    if not is_series(asked):
        job = await store.find(job_id)
        return job if job is not None and job.spec.kind == kind else None
    jobs = await _find_series(store, job_id)
    if len(jobs) == 1:
        return RedirectResponse(path_of(kind, jobs[0].build_id), 307)
    return page("jobs.html", f"{kind.title()}s {asked}", jobs=[_entry(kind, job) for job in jobs]) if jobs else None


async def _find_series(store: BuildStore, series: str) -> list[BuildRecord]:
    """The last jobs of a series, the newest first; those that are not kept any more are left out."""
    newest = await store.newest(series)
    parts = split_build_id(newest.build_id) if newest else None
    if newest is None or parts is None:
        return []
    numbers = range(parts[1] - 1, max(parts[1] - MAX_LISTED, 0), -1)
    others = await asyncio.gather(*(store.find(f"{series}_{number}") for number in numbers))
    return [newest, *(one for one in others if one)]


def _entry(kind: Kind, job: BuildRecord) -> dict[str, Any]:
    time = format_time(datetime.fromtimestamp(job.created, UTC))
    return {"id": job.build_id, "href": path_of(kind, job.build_id), "state": state_of(job), "time": time}


def scan_facts(told: Mapping[str, Any]) -> list[Fact]:
    """The scans that the API tells of a container, a build or a mirror."""
    of_platforms = [(ref["id"], f"Scan of {ref['value']}") for ref in told.get("scanChildIds", {}).get("refs", [])]
    named = of_platforms or [(told["scanId"], "Scan")] if "scanId" in told else []
    return [fact(label, scan_id, path_of("scan", scan_id)) for scan_id, label in named]


def inspect_path(image: str) -> str:
    """Where the page is that inspects an image; empty for a Singularity image, which is no container image."""
    return "" if image.startswith("oras://") else f"/view/inspect?image={quote(image, safe='')}"


async def read_end_of_log(store: BuildStore, build_id: str, href: str) -> Log:
    """What a page shows of a job's log."""
    return end_of_log(*await store.read_end(build_id, MAX_LOG_BYTES), href)


def commands_for(image: str) -> list[str]:
    """What people type to have an image that is there."""
    if image.startswith("oras://"):
        return [f"apptainer pull {image}"]
    return [f"docker pull {image}", f"docker run --rm {image}"]


def end_of_log(content: bytes, before: int, href: str) -> Log:
    """The end of a log, ``before`` bytes of which are left out: from the beginning of a line on if there is one."""
    start = content.find(b"\n") + 1 if before else 0
    return Log(content[start:].decode(errors="replace"), before + start, before + len(content), href)

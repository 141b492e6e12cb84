"""What is told of builds, mirrors and scans ends when they go on: the word of that, from whichever machine it comes."""

import asyncio

import structlog

from wave_proxy.errors import StateUnavailable
from wave_proxy.serve.ready import ReadyReplies
from wave_proxy.state.build_records import BuildRecords

_RECONNECT_S = 1.0

_log = structlog.get_logger()


async def follow_jobs(jobs: BuildRecords, ready: ReadyReplies) -> None:
    """Drop ready-made replies about jobs as these change, until cancelled."""
    while True:
        try:
            async for job_id in jobs.changes():
                if job_id:
                    ready.forget(job_id)
                else:  # what was announced before is lost
                    ready.clear()
        except StateUnavailable as err:
            _log.warning("no word of jobs", error=str(err))
        await asyncio.sleep(_RECONNECT_S)

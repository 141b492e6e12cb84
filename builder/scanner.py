"""One scan from its record to the kept report."""

import asyncio
from re import compile as compile_pattern

from builder.failures import NOT_BUILT, TIMED_OUT, BuildFailed
from builder.fetching import Fetching
from builder.lending import Lending
from builder.logbook import LogBook
from builder.trivy import Report, Trivy
from builder.work import Confirm, until_answered
from builder.workspace import Workspace, Workspaces
from wave_proxy.errors import StateUnavailable, WaveError
from wave_proxy.image.build import BuildRecord
from wave_proxy.image.reference import parse_reference
from wave_proxy.image.scan import count_severities, worst_first
from wave_proxy.state.scans import ScanReports

_NOT_IN_NAME = compile_pattern(r"[^a-zA-Z0-9_.-]+")


class Scanner:
    """Scans images; the reports list ``most`` vulnerabilities each, the worst ones."""

    def __init__(
        self,
        trivy: Trivy,
        fetching: Fetching,
        workspaces: Workspaces,
        lending: Lending,
        reports: ScanReports,
        *,
        most: int,
    ) -> None:
        self._trivy = trivy
        self._fetching = fetching
        self._workspaces = workspaces
        self._lending = lending
        self._reports = reports
        self._most = most

    async def run(self, record: BuildRecord, book: LogBook, confirm: Confirm) -> str:
        """Scan and keep the report; returns the digest of the manifest. Source: ``wave.md`` §6.11. As Work has it."""
        spec = record.spec
        book.say(f"scan {record.build_id} of {spec.target_image}, attempt {max(record.attempt, 1)}")
        try:
            async with asyncio.timeout(spec.timeout_s) as limit, self._workspaces.open(record) as workspace:
                digest, report = await self._scan(record, workspace, book)
                await confirm()
                await self._keep(record.build_id, report, book)
                return digest
        except TimeoutError:
            if not limit.expired():
                raise
            raise BuildFailed(
                f"Container scan timed out: it took longer than its limit of {spec.timeout_s:g} s, [scan] timeout",
                TIMED_OUT,
            ) from None

    async def _scan(self, record: BuildRecord, workspace: Workspace, book: LogBook) -> tuple[str, Report]:
        spec = record.spec
        image = parse_reference(spec.source_image)
        # Its name is what the SPDX document calls the image.
        layout = workspace.folder / _NOT_IN_NAME.sub("_", spec.target_image)[-150:].lstrip("-.")
        async with self._lending.lend(spec, image) as path:
            try:
                digest = await self._fetching.fetch(path, image.reference, spec.platform, layout, book.say)
            except StateUnavailable:
                raise
            except WaveError as err:
                why = str(err).replace(path, image.repository)
                raise BuildFailed(f"the image can't be had: {why}", NOT_BUILT) from None
        for place, shown in self._trivy.places(workspace.folder).items():
            book.hide(place, shown)
        return digest, await self._trivy.scan(layout, book.say, book.write)

    async def _keep(self, scan_id: str, report: Report, book: LogBook) -> None:
        counts = count_severities(report.found)
        listed = worst_first(report.found)[: self._most]
        is_kept = await until_answered(lambda: self._reports.keep(scan_id, counts, listed, report.spdx))
        if not (report.spdx and is_kept):
            book.say("the SPDX document is too large to be kept")
        told = ", ".join(f"{count} {severity.lower()}" for severity, count in reversed(counts.items()))
        book.say(f"vulnerabilities: {told or 'none'}")

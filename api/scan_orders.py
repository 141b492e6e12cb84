"""Scans that requests ask for: found, joined, or begun (``wave.md`` §6.11)."""

from collections.abc import Sequence
from time import time

from api.building.naming import hash_attributes, hidden_id
from wave_proxy.image.build import BuildRecord, BuildSpec
from wave_proxy.image.reference import parse_reference
from wave_proxy.image.request import ContainerRequest
from wave_proxy.image.scan import Scan
from wave_proxy.state.builds import BuildStore, no_quota
from wave_proxy.state.scans import ScanReports
from wave_proxy.state.usage import Usage


class ScanOrders:
    """Has images scanned, each once in a while, however many ask for it.

    What was found answers for ``memory_s``; a scan takes ``timeout_s`` at most. ``secret`` goes into the ids of scans
    of private images.
    """

    def __init__(
        self,
        builds: BuildStore,
        reports: ScanReports,
        usage: Usage,
        *,
        enabled: bool = False,
        timeout_s: float = 900.0,
        memory_s: float = 7 * 86400.0,
        secret: bytes = b"",
    ) -> None:
        self._builds = builds
        self._reports = reports
        self._usage = usage
        self.enabled = enabled
        self._timeout_s = timeout_s
        self._memory_s = memory_s
        self._secret = secret

    async def of_image(self, wanted: ContainerRequest, digest: str, *, is_private: bool = False) -> tuple[str, ...]:
        """The scan of an image that is there; none unless the request asks for one. Raises StateUnavailable."""
        if not (self.enabled and wanted.scan_mode) or wanted.dry_run:
            return ()
        reference = parse_reference(wanted.image)
        spec = BuildSpec(
            self._id_of(("image", wanted.image), ("digest", digest), is_private=is_private),
            wanted.image,
            "",
            platform=wanted.platforms[0] if wanted.platforms else "",
            kind="scan",
            source_image=f"{reference.registry}/{reference.repository}@{digest}",
            timeout_s=self._timeout_s,
            identity=wanted.identity,
            ip_address=wanted.ip_address,
            private=is_private,
        )
        return (await self._submit(spec, None),)

    async def of_job(self, made_by: BuildSpec, job_id: str, *, is_cached: bool, asked: bool) -> tuple[str, ...]:
        """The scans of what a build or a mirror makes, one for each platform: begun when it has succeeded.

        What was made before (``is_cached``) is scanned only where the request itself has ``asked`` for that, and else
        named if it was. Raises StateUnavailable.
        """
        if not self.enabled or made_by.format == "sif":
            return ()
        if is_cached and not asked:
            return await self.known(made_by, job_id)
        job = await self._builds.find(job_id)
        return tuple([await self._submit(spec, job) for spec in self._specs_of(made_by, job_id)])

    async def known(self, made_by: BuildSpec, job_id: str) -> tuple[str, ...]:
        """The scans of what that job has made or will make, as far as there are some. Raises StateUnavailable."""
        if not self.enabled:
            return ()
        known = [await self._builds.find_by_target(spec.slot) for spec in self._specs_of(made_by, job_id)]
        return tuple(record.build_id for record in known if record is not None and record.spec.made_by == job_id)

    async def find(self, scan_ids: Sequence[str]) -> list[Scan | None]:
        """The scans with these ids; None for what there is not (any more). Raises StateUnavailable."""
        return [await self._find(scan_id) for scan_id in scan_ids]

    async def _find(self, scan_id: str) -> Scan | None:
        record = await self._builds.find(scan_id)
        if record is None:
            return None
        return Scan(record, await self._reports.find_counts(scan_id) if record.succeeded else {})

    def _specs_of(self, made_by: BuildSpec, job_id: str) -> list[BuildSpec]:
        platforms = made_by.platforms
        name = _name_of(made_by)
        return [
            BuildSpec(
                self._id_of(
                    ("image", f"{name}#{platform}" if len(platforms) > 1 else name), is_private=made_by.private
                ),
                made_by.target_image,
                "",
                platform=platform,
                kind="scan",
                source_image=made_by.target_image,
                made_by=job_id,
                timeout_s=self._timeout_s,
                identity=made_by.identity,
                ip_address=made_by.ip_address,
                logins=made_by.logins,
                private=made_by.private,
            )
            for platform in platforms
        ]

    def _id_of(self, *attributes: tuple[str, str], is_private: bool) -> str:
        known_id = hash_attributes(attributes)
        return hidden_id(known_id, self._secret) if is_private else known_id

    async def _submit(self, spec: BuildSpec, job: BuildRecord | None) -> str:
        known = await self._builds.find_by_target(spec.slot)
        gone = known.build_id if known is not None and self._is_old(known, job) else ""
        record, is_new = await self._builds.submit(spec, no_quota, gone=gone, after=job.build_id if job else "")
        if is_new:
            self._usage.count_job("scans", spec.identity.email, spec.platform)
        return record.build_id

    def _is_old(self, scan: BuildRecord, job: BuildRecord | None) -> bool:
        """Whether a scan is of another time, or of an image that the job has put another one in the place of."""
        if scan.phase != "done":
            return False
        return scan.finished + self._memory_s <= time() or (job is not None and scan.created < job.created)


def _name_of(made_by: BuildSpec) -> str:
    """The image as clients call it: without the registry that they have left out. So are the ids of the API page."""
    if made_by.build_repository.startswith("docker.io/"):
        return made_by.target_image
    return made_by.target_image.removeprefix("docker.io/")

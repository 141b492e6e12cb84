"""Builds that requests ask for: found done, joined, or begun (``wave.md`` §4.10)."""

from api.answers import Outcome
from api.building.planning import Planner
from api.rules import NO_SINGULARITY, not_enabled
from api.schema import Submission
from api.sizes import Sizes
from wave_proxy.errors import NotImplementedHere
from wave_proxy.image.build import BuildRecord, BuildSpec
from wave_proxy.image.request import ContainerRequest
from wave_proxy.state.builds import BuildStore
from wave_proxy.state.quota import Quotas, subject_of
from wave_proxy.state.usage import Usage


class Orders:
    """Has images built, each once, however many ask for it."""

    def __init__(
        self,
        builds: BuildStore,
        planner: Planner,
        quotas: Quotas,
        usage: Usage,
        sizes: Sizes,
        *,
        enabled: bool = True,
    ) -> None:
        self._builds = builds
        self._planner = planner
        self._quotas = quotas
        self._usage = usage
        self._sizes = sizes
        self._enabled = enabled

    async def plan(self, request: Submission, wanted: ContainerRequest) -> BuildSpec:
        """What to build for a request. Raises as ``Planner.plan``; NotImplementedHere where nothing is built."""
        if not self._enabled:
            raise not_enabled("Container build", "build", "[build] engine")
        return await self._planner.plan(request, wanted)

    async def find(self, build_id: str) -> BuildRecord | None:
        """The record of a build; None when there is none (any more). Raises StateUnavailable."""
        return await self._builds.find(build_id)

    async def place(self, spec: BuildSpec, *, dry_run: bool) -> Outcome:
        """Have an image built, unless it is there or being built. Never waits for a build.

        Raises RequestInvalid, TooManyRequests, UpstreamUnavailable, StateUnavailable.
        """
        # Asked for in this order: of a build that ends in between, the registry says that its image is there.
        known = await self._builds.find_by_target(spec.target_image)
        digest = await self._planner.find_image(spec)
        if dry_run:
            return Outcome(f"{spec.container_id}_0", cached=bool(digest), succeeded=True)
        if digest:
            is_same = known is not None and known.succeeded and known.digest == digest
            return Outcome(known.build_id if known and is_same else "", cached=True, succeeded=True)
        if spec.format == "sif":
            raise NotImplementedHere(f"format: {NO_SINGULARITY}")
        gone = known.build_id if known is not None and known.succeeded else ""
        record, is_new = await self._submit(spec, gone)
        return Outcome(record.build_id, cached=record.phase == "done", succeeded=None if is_new else record.succeeded)

    async def _submit(self, spec: BuildSpec, gone: str) -> tuple[BuildRecord, bool]:
        async def admit() -> None:
            email, address = spec.identity.email, spec.ip_address
            with self._sizes.admitted(await self._planner.cost(spec), email, address):
                subject = subject_of("build", email, address)
                if not self._quotas.try_admit(subject):
                    await self._quotas.admit(subject)
                await self._planner.keep(contents)

        kept, contents = await self._planner.unpack(spec)
        record, is_new = await self._builds.submit(kept, admit, gone=gone)
        if is_new:
            self._usage.count_job("builds", spec.identity.email, spec.platform)
        return record, is_new

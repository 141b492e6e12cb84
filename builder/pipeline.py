"""One build from its record to the pushed image."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path

from builder.bases import Base, Bases
from builder.engines import Engine, Job
from builder.failures import NOT_BUILT, BuildFailed, timed_out
from builder.lending import Lending
from builder.logbook import LogBook
from builder.work import Confirm, until_answered
from builder.workspace import Workspace, Workspaces
from wave_proxy.errors import Denied, RequestInvalid, TooManyRequests, WaveError
from wave_proxy.image.build import BuildRecord, BuildSpec
from wave_proxy.image.containerfile import base_images, final_base
from wave_proxy.image.oci import parse_platforms
from wave_proxy.image.reference import Reference, parse_reference
from wave_proxy.upstream.credentials import Credentials, Login
from wave_proxy.upstream.layout import Content, platform_of, read_layout
from wave_proxy.upstream.publish import publish
from wave_proxy.upstream.registry import Registry

_OWN_LOGIN = (
    "wave-proxy does not take this builder's login for its local repositories; [build] secret must be set, to the same "
    "text for the proxy and for the builder"
)


class Pipeline:
    """Runs builds."""

    def __init__(
        self,
        engine: Engine,
        workspaces: Workspaces,
        registry: Registry,
        lending: Lending,
        credentials: Credentials,
    ) -> None:
        self._engine = engine
        self._workspaces = workspaces
        self._registry = registry
        self._lending = lending
        self._bases = Bases(registry, lending.authority)
        self._credentials = credentials

    async def run(self, record: BuildRecord, book: LogBook, confirm: Confirm) -> str:
        """Build and push; returns the manifest's digest. ``confirm`` is awaited before anything is pushed.

        Nothing of the build is left on this machine. Raises BuildFailed, and what ``confirm`` raises.
        """
        spec = record.spec
        if spec.format == "sif":
            raise BuildFailed("Singularity images are not built by this version yet", NOT_BUILT)
        try:
            async with asyncio.timeout(spec.timeout_s) as limit, self._workspaces.open(record) as workspace:
                return await self._build(record, workspace, book, confirm)
        except TimeoutError:
            if not limit.expired():
                raise
            raise timed_out(spec.timeout_s) from None

    async def _build(self, record: BuildRecord, workspace: Workspace, book: LogBook, confirm: Confirm) -> str:
        spec = record.spec
        _say_what(record, book)
        images = _read_bases(spec)
        await until_answered(lambda: self._workspaces.fill(workspace, record))
        async with self._bases_of(spec, images, book) as bases:
            locations = {_name(base.image): f"{self._engine.registry}/{base.path}" for base in bases}
            await self._check_bases(spec, bases)
            job = Job(spec, workspace.folder, locations, self._write_logins(spec, workspace), book.write)
            with _explained(bases):
                layout = await self._engine.build(job)
        await asyncio.to_thread(check_platforms, layout, spec.platform)
        await confirm()
        return await self._push(layout, spec, book)

    async def _push(self, layout: Path, spec: BuildSpec, book: LogBook) -> str:
        book.say(f"pushing to {spec.target_image}")
        registry = self._registry.acting_for(spec.identity.local_email, spec.logins)
        try:
            digest = await publish(registry, layout, parse_reference(spec.target_image), on_progress=book.say)
        except TooManyRequests as err:
            raise BuildFailed(f"upstream limits requests (429): the image can't be pushed: {err}") from None
        except Denied as err:
            is_own = parse_reference(spec.target_image).registry == self._lending.authority
            raise BuildFailed(f"the image can't be pushed: {_OWN_LOGIN if is_own else err}") from None
        except WaveError as err:
            raise BuildFailed(f"the image can't be pushed: {err}") from None
        book.say(f"pushed {spec.target_image}@{digest}")
        return digest

    def _write_logins(self, spec: BuildSpec, workspace: Workspace) -> Path | None:
        logins: dict[str, Login] = {}
        if spec.cache_repository:
            cache = parse_reference(spec.cache_repository)
            credentials = self._credentials.of(spec.identity.local_email, spec.logins)
            login = credentials.find(cache.registry, cache.repository)
            logins = {cache.registry: login} if login else {}
        return workspace.write_logins(logins)

    # --- base images ---------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _bases_of(self, spec: BuildSpec, images: Iterable[Reference], book: LogBook) -> AsyncIterator[list[Base]]:
        """The base images, each in a repository at wave-proxy, by a token that ends with the block."""
        paths: dict[str, str] = {}
        bases: list[Base] = []
        async with AsyncExitStack() as lent:
            for image in images:
                name = _name(image)
                if name not in paths:
                    paths[name] = await lent.enter_async_context(self._lending.lend(spec, image))
                    book.hide(f"{self._engine.registry}/{paths[name]}", name)
                    book.hide(paths[name], image.repository)
                bases.append(await self._bases.look(paths[name], image))
                book.say(f"base image {image}{bases[-1].digest}")
            yield bases

    async def _check_bases(self, spec: BuildSpec, bases: Iterable[Base]) -> None:
        """Check that the image which becomes the built one is for its platforms. Raises BuildFailed."""
        known = {base.image: base for base in bases}
        for platform in spec.platforms:
            final = final_base(spec.container_file, platform)
            if final is not None and final[0] in known:
                await self._bases.check(known[final[0]], final[1])


def _name(image: Reference) -> str:
    return f"{image.registry}/{image.repository}"


@contextmanager
def _explained(bases: Iterable[Base]) -> Iterator[None]:
    """Say why wave-proxy could not give a base image, where the tools only tell its status."""
    try:
        yield
    except BuildFailed as err:
        for base in bases:
            if base.problem and "unexpected HTTP status" in err.reason and _name(base.image) in err.reason:
                raise BuildFailed(f"base image can't be read: {base.problem}", err.exit_status) from None
        raise


def _say_what(record: BuildRecord, book: LogBook) -> None:
    spec = record.spec
    what = f"{spec.template} for {spec.platform}" if spec.template else f"a container file for {spec.platform}"
    book.say(f"build {record.build_id} of {what}, attempt {max(record.attempt, 1)}")
    book.say(f"image {spec.target_image}")


def _read_bases(spec: BuildSpec) -> tuple[Reference, ...]:
    try:
        images = [base_images(spec.container_file, platform) for platform in spec.platforms]
        return tuple(dict.fromkeys(image for several in images for image in several))
    except RequestInvalid as err:
        raise BuildFailed(f"the container file can't be built: {err}", NOT_BUILT) from None


def check_platforms(layout: Path, wanted: str) -> None:
    """Check that the images in a layout are for these platforms (``linux/amd64,linux/arm64``). Raises BuildFailed."""
    platforms = parse_platforms(wanted)
    try:
        content = read_layout(layout)
        found = [platform_of(layout, image) for image in _images_of(content)]
    except WaveError as err:
        raise BuildFailed(f"the build made no image that can be read: {err}") from None
    if content.children and len(platforms) == 1:
        raise BuildFailed("the build made an index, and one image is expected")
    if len(found) != len(platforms):
        raise BuildFailed(f"the build made {len(found)} images, and {len(platforms)} are expected, for {wanted}")
    for platform, made in zip(platforms, found, strict=True):
        # Many images for 32-bit ARM don't say which variant they are.
        if not platform.matches(made.os, made.architecture, made.variant or platform.variant):
            raise BuildFailed(
                f"missing platform: the built image is for {made}, and {platform} was asked for; is the base image "
                "available for it?"
            )


def _images_of(content: Content) -> tuple[Content, ...]:
    return content.children or (content,)

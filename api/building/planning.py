"""From a container request to what is built: texts, repository, names and id (``wave.md`` §4.8 and 4.9)."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace

from api.building.freeze import base_of, entrypoint_of, frozen
from api.building.ingredients import Ingredients
from api.building.naming import cache_repository, container_id, hidden_id, target_image
from api.building.recipes import recipe_for
from api.images.inspection import fetch_entrypoint
from api.images.reading import ImageReader
from api.registries import Registries
from api.schema import Submission
from wave_proxy.errors import (
    ContentMismatch,
    Denied,
    HostUnknown,
    ManifestUnknown,
    NameUnknown,
    RequestInvalid,
    clip,
)
from wave_proxy.image.build import BuildSpec, Compression, Compressor, Format
from wave_proxy.image.oci import LINUX_AMD64, Platform, parse_platforms
from wave_proxy.image.private import private_folder, private_repository
from wave_proxy.image.reference import parse_reference
from wave_proxy.image.request import ContainerConfig, ContainerRequest, Identity
from wave_proxy.state.tokens import TokenStore


@dataclass(frozen=True, slots=True)
class BuildDefaults:
    """What the operator decided for requests that leave it open.

    Content that a request carries is kept for ``kept_s`` for the builder. ``local`` is what the names of our own
    repositories begin with.
    """

    repository: str
    local: str = ""
    cache_repository: str = ""
    conda_template: str = "conda/micromamba:v1"
    compression: Compressor = "gzip"
    timeout_s: float = 900.0
    kept_s: float = 7 * 86400.0


def wants_build(request: Submission) -> bool:
    """Whether a request is for an image that does not exist yet.

    Attributes that only say how a build would be done (repositories, compression, template) do not make one: Nextflow
    sends them with requests for plain images too, when its configuration has them.
    """
    return bool(request.container_file or request.packages or request.conda_file or request.freeze)


class Planner:
    """Makes specs of builds, and knows whether what they make is there."""

    def __init__(
        self,
        registries: Registries,
        images: ImageReader,
        tokens: TokenStore,
        defaults: BuildDefaults,
        secret: bytes = b"",
    ) -> None:
        """``secret`` goes into the ids of builds of private images."""
        self._registries = registries
        self._images = images
        self._tokens = tokens
        self._defaults = defaults
        self._secret = secret
        self._ingredients = Ingredients(registries, tokens, defaults.local.partition("/")[0])

    async def plan(self, request: Submission, wanted: ContainerRequest) -> BuildSpec:
        """What to build for a request; of ``wanted``, what the submission does not say by itself.

        Raises RequestInvalid, UpstreamUnavailable.
        """
        kind: Format = "sif" if request.format == "sif" else "docker"
        platforms = parse_platforms(request.container_platform or str(LINUX_AMD64))
        platform = ",".join(str(one) for one in platforms)
        recipe = await asyncio.to_thread(recipe_for, request, default_template=self._defaults.conda_template)
        baked = _baked(wanted.config, platforms) if request.freeze else ContainerConfig()
        text = recipe.container_file
        if request.freeze:
            text = await self._freeze(text, request.container_image or "", baked, platforms[0], kind, wanted.identity)
        context = request.build_context.to_layer() if request.build_context else None
        draft = BuildSpec(
            container_id="",
            target_image="",
            container_file=text,
            conda_file=recipe.conda_file,
            context=context,
            layers=baked.layers,
            platform=platform,
            format=kind,
            compression=self._compression(request),
            template=recipe.template,
            freeze=bool(request.freeze),
            timeout_s=self._defaults.timeout_s,
            identity=wanted.identity,
            ip_address=wanted.ip_address,
        )
        is_private = await self._ingredients.are_private(draft)
        repository = self._repository(request, wanted.identity, is_private=is_private)
        cache = self._cache_repository(request, is_private=is_private)
        # In a thread: layers that the request itself carries are megabytes to hash.
        name = await asyncio.to_thread(
            container_id,
            container_file=text,
            conda_file=recipe.conda_file,
            platform=platform,
            repository=repository,
            context=context,
            config=request.container_config if baked else None,
            included=wanted.config.layers[len(request.config.layers) :] if baked else (),
            cache="" if cache == self._defaults.cache_repository else cache,
        )
        if is_private:
            name = hidden_id(name, self._secret)
        target = target_image(repository, name, recipe.conda_file, request.name_strategy)
        if self._is_ours(target) and not target.startswith(f"{self._defaults.local}/"):
            raise RequestInvalid(
                f"buildRepository: on this server it begins with {self._defaults.local}/, got {clip(repository)}"
            )
        return replace(
            draft,
            container_id=name,
            target_image=str(parse_reference(target)),
            build_repository=repository,
            cache_repository=cache,
            private=is_private,
        )

    def _repository(self, request: Submission, identity: Identity, *, is_private: bool) -> str:
        asked, local = request.build_repository or "", self._defaults.local
        if not is_private:
            return asked or self._defaults.repository
        own = private_folder(local, identity.key)
        if asked and f"{asked}/".startswith(f"{local}/") and not f"{asked}/".startswith(f"{own}/"):
            raise RequestInvalid(
                f"buildRepository: the image is made of private ones, and on this server begins with {own}, "
                f"got {clip(asked)}"
            )
        return asked or private_repository(local, identity.key)

    async def unpack(self, spec: BuildSpec) -> tuple[BuildSpec, Mapping[str, bytes]]:
        """The spec with the user's own logins and without what it carries; and that, by digest, for ``keep``.

        Raises RequestInvalid for inline layers and contexts that are not what they say, PlatformError.
        """
        try:
            names = {len(spec.layers): "buildContext"}
            kept, contents = await self._tokens.take_out(spec.carried, names)
        except ContentMismatch as err:  # the caller's fault, not an upstream's
            raise RequestInvalid(str(err)) from None
        written = [parse_reference(name) for name in (spec.cache_repository, spec.target_image) if name]
        logins = await self._registries.logins_for(spec.identity, *written)
        context = kept[-1] if spec.context else None
        return replace(spec, layers=kept[: len(spec.layers)], context=context, logins=logins), contents

    async def cost(self, spec: BuildSpec) -> int:
        """How many bytes it takes to keep a spec with its context. Raises StateUnavailable."""
        context = (spec.context,) if spec.context else ()
        return len(spec.container_file) + len(spec.conda_file) + await self._tokens.missing_bytes(context)

    async def keep(self, contents: Mapping[str, bytes]) -> None:
        """Keep what a spec carries where the builder finds it. Raises StateUnavailable."""
        await self._tokens.keep(contents, self._defaults.kept_s)

    async def find_image(self, spec: BuildSpec) -> str:
        """The digest of the image that a build would make; empty when it is not there.

        Raises RequestInvalid when its repository can't be read, UpstreamUnavailable.
        """
        target = parse_reference(spec.target_image)
        try:
            registry = await self._registries.open(spec.identity, target)
            head = await registry.head_manifest(target.registry, target.repository, target.reference, at_once=True)
        except (Denied, HostUnknown) as err:
            raise RequestInvalid(f"buildRepository: {clip(spec.build_repository)} can't be used: {err}") from None
        except (ManifestUnknown, NameUnknown):
            return ""
        return head.digest

    async def _freeze(
        self, text: str, image: str, config: ContainerConfig, platform: Platform, kind: Format, identity: Identity
    ) -> str:
        """The container file with the changes in it. Source: ``wave.md`` §4.8."""
        if text and not config:
            return text
        own = entrypoint_of(text) if text else None
        base = base_of(text) if text else image
        if own is None and base:
            reference = parse_reference(base)
            own = await self._images.read(
                identity, reference, lambda registry, place: fetch_entrypoint(registry, place, platform)
            )
        named = str(parse_reference(image)) if image else ""
        return frozen(container_file=text, image=named, config=config, entrypoint=own or (), kind=kind)

    def _is_ours(self, repository: str) -> bool:
        """Whether it is on this server, local or not."""
        local = self._defaults.local
        return bool(local) and repository.partition("/")[0] == local.partition("/")[0]

    def _cache_repository(self, request: Submission, *, is_private: bool) -> str:
        asked, local = request.cache_repository or "", self._defaults.local
        # A build itself writes there, so it must not be where others' images are.
        if self._is_ours(asked) and not f"{asked}/".startswith(f"{local}/cache/"):
            raise RequestInvalid(f"cacheRepository: a local one begins with {local}/cache, got {clip(asked)}")
        if is_private:  # layers that are kept for others must not be those
            return "" if local and f"{asked}/".startswith(f"{local}/") else asked
        return cache_repository(
            request.build_repository or "",
            request.cache_repository or "",
            default_build=self._defaults.repository,
            default_cache=self._defaults.cache_repository,
        )

    def _compression(self, request: Submission) -> Compression:
        asked = request.build_compression
        if asked is None:
            return Compression(self._defaults.compression)
        return Compression(asked.mode or self._defaults.compression, asked.level, asked.force)


def _baked(config: ContainerConfig, platforms: tuple[Platform, ...]) -> ContainerConfig:
    """The changes that go into an image of these platforms. Raises RequestInvalid for a layer of one among several."""
    architectures = [platform.architecture for platform in platforms]
    layers = []
    for position, layer in enumerate(config.layers):
        fitting = [layer.fits(architecture) for architecture in architectures]
        if all(fitting):
            layers.append(layer)
        elif any(fitting):
            raise RequestInvalid(
                f"containerConfig.layers[{position}]: a layer of one architecture can't be frozen into an image of "
                "several: make a request for each platform"
            )
    return replace(config, layers=tuple(layers))

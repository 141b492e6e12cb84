"""A token's settings put into the image that it stands for: fetches what that takes, and remembers what was made.

What is made is a pure function of the request and the upstream manifest. So it is kept in memory only, and made again
when it is asked for later, or by another worker: the state store remembers which upstream manifest each digest came
from.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import structlog

from wave_proxy.cache.flight import Flights
from wave_proxy.cache.manifests import StoredManifest
from wave_proxy.cache.repositories import Repositories
from wave_proxy.errors import StateUnavailable, Unsupported
from wave_proxy.image.oci import (
    CONFIG_TYPES,
    MANIFEST_TYPES,
    Descriptor,
    IndexEntry,
    Manifest,
    digest_of,
    parse_platform,
    read_manifest,
)
from wave_proxy.image.request import ContainerConfig
from wave_proxy.image.rewrite import architecture_of, layers_for, rewrite_config, rewrite_index, rewrite_manifest
from wave_proxy.serve.resolve import Target
from wave_proxy.state.tokens import TokenStore
from wave_proxy.upstream.credentials import Login

_log = structlog.get_logger()

_MEMORY_BYTES = 64 << 20
_MAX_PLATFORMS = 64  # the largest official images have about twenty


@dataclass(frozen=True, slots=True)
class Made:
    """A rewritten manifest or index, with everything that was made along with it.

    ``contents`` has the new manifests and configs by digest; ``sources`` says from which upstream manifest each came.
    ``architecture`` is what the config names; empty for an index.
    """

    digest: str
    contents: Mapping[str, StoredManifest]
    sources: Mapping[str, str]
    architecture: str = ""

    @property
    def size(self) -> int:
        """Bytes of all contents."""
        return sum(len(content.content) for content in self.contents.values())


@dataclass(frozen=True, slots=True)
class _Recipe:
    """What decides the result, and with which login it is read: what was made for one is shown to no other."""

    login: Login | None
    registry: str
    repository: str
    source: str
    config: ContainerConfig
    platforms: tuple[str, ...]


class Augmenter:
    """Makes and remembers rewritten images."""

    def __init__(self, repositories: Repositories, tokens: TokenStore) -> None:
        self._repositories = repositories
        self._tokens = tokens
        self._making: Flights[_Recipe, Made] = Flights()
        self._memory: OrderedDict[_Recipe, Made] = OrderedDict()
        self._by_digest: dict[str, _Recipe] = {}
        self._bytes = 0
        self._recorded: OrderedDict[tuple[str, str], None] = OrderedDict()

    async def augment(self, target: Target, source: str) -> Made:
        """The rewritten form of the upstream manifest or index ``source``. Raises Unsupported, UpstreamError, …"""
        made = await self._make(target, source)
        await self._record(target, source, made)
        return made

    async def find(self, target: Target, digest: str) -> StoredManifest | None:
        """The manifest or config of that digest if it was made for the token, by whichever worker; None if not."""
        recipe = self._by_digest.get(digest)
        if recipe is not None and recipe == _recipe(target, recipe.source):
            source: str | None = recipe.source
        else:
            source = await self._tokens.find_made(target.token, digest)
        return (await self._make(target, source)).contents.get(digest) if source else None

    async def close(self) -> None:
        """End what is being made."""
        await self._making.close()

    async def _make(self, target: Target, source: str) -> Made:
        recipe = _recipe(target, source)
        known = self._memory.get(recipe)
        if known is not None:
            # It is here, so that this asks upstream only whether the login still opens the repository.
            await self._view(recipe).fetch_manifest(recipe.registry, recipe.repository, source)
            if recipe in self._memory:
                self._memory.move_to_end(recipe)
            return known
        made = await self._making.run(recipe, lambda: self._build(recipe))
        self._remember(recipe, made)
        return made

    def _remember(self, recipe: _Recipe, made: Made) -> None:
        if recipe not in self._memory:
            self._memory[recipe] = made
            self._by_digest.update(dict.fromkeys(made.contents, recipe))
            self._bytes += made.size
        while self._bytes > _MEMORY_BYTES and len(self._memory) > 1:
            forgotten, oldest = self._memory.popitem(last=False)
            self._bytes -= oldest.size
            for digest in oldest.contents:
                if self._by_digest.get(digest) == forgotten:
                    del self._by_digest[digest]

    async def _record(self, target: Target, source: str, made: Made) -> None:
        key = (target.token, source)
        if key in self._recorded or target.request is None:
            return
        try:
            lifetime_s = target.request.expires - target.request.created
            await self._tokens.record_made(target.token, made.sources, lifetime_s)
        except StateUnavailable as err:
            _log.warning("only this worker can serve what it made", error=str(err))
            return
        self._recorded[key] = None
        if len(self._recorded) > 100_000:
            self._recorded.popitem(last=False)

    def _view(self, recipe: _Recipe) -> Repositories:
        return self._repositories.as_seen_by(recipe.registry, recipe.login)

    async def _build(self, recipe: _Recipe) -> Made:
        original = await self._view(recipe).fetch_manifest(recipe.registry, recipe.repository, recipe.source)
        manifest = read_manifest(original.content, original.media_type)
        if manifest.is_index:
            return await self._build_index(recipe, original, manifest)
        return await self._build_image(recipe, original, manifest)

    async def _build_image(self, recipe: _Recipe, original: StoredManifest, manifest: Manifest) -> Made:
        old_config = manifest.config
        if not manifest.is_image or old_config is None:
            raise Unsupported(
                f"containerConfig can't be applied to {recipe.registry}/{recipe.repository}: "
                f"its media type is {_kind(manifest)}, which is not that of a container image"
            )
        old = await self._view(recipe).read_config(
            recipe.registry, recipe.repository, old_config.digest, old_config.size
        )
        architecture = architecture_of(old)
        layers = layers_for(recipe.config.layers, architecture)
        config = rewrite_config(old, recipe.config, layers)
        config_descriptor = Descriptor(old_config.media_type, digest_of(config), len(config))
        content = rewrite_manifest(original.content, original.media_type, config_descriptor, layers)
        digest = digest_of(content)
        contents = {
            digest: StoredManifest(content, original.media_type, digest),
            config_descriptor.digest: StoredManifest(config, old_config.media_type, config_descriptor.digest),
        }
        return Made(digest, contents, dict.fromkeys(contents, original.digest), architecture)

    async def _build_index(self, recipe: _Recipe, original: StoredManifest, index: Manifest) -> Made:
        chosen = _choose(recipe, index.entries)
        if not chosen:
            wanted = ",".join(recipe.platforms) or "any"
            raise Unsupported(
                f"Cannot find matching platform '{wanted}' in the image index for "
                f"'{recipe.registry}/{recipe.repository}'"
            )
        if len(chosen) > _MAX_PLATFORMS:
            raise Unsupported(
                f"the image index has {len(chosen)} platforms and at most {_MAX_PLATFORMS} are changed at once: "
                "ask for one with containerPlatform"
            )
        children = await self._build_children(recipe, chosen)
        replaced = {
            position: Descriptor(
                chosen[position].descriptor.media_type, made.digest, len(made.contents[made.digest].content)
            )
            for position, made in children.items()
        }
        content = rewrite_index(original.content, replaced)
        digest = digest_of(content)
        contents = {digest: StoredManifest(content, original.media_type, digest)}
        sources = {digest: original.digest}
        for made in children.values():
            contents.update(made.contents)
            sources.update(dict.fromkeys(made.contents, original.digest))
        return Made(digest, contents, sources)

    async def _build_children(self, recipe: _Recipe, chosen: Mapping[int, IndexEntry]) -> dict[int, Made]:
        try:
            async with asyncio.TaskGroup() as group:
                building = {
                    position: group.create_task(self._build_child(recipe, entry)) for position, entry in chosen.items()
                }
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return {position: task.result() for position, task in building.items()}

    async def _build_child(self, recipe: _Recipe, entry: IndexEntry) -> Made:
        digest = entry.descriptor.digest
        child = await self._view(recipe).fetch_manifest(recipe.registry, recipe.repository, digest)
        return await self._build_image(recipe, child, read_manifest(child.content, child.media_type))


def _recipe(target: Target, source: str) -> _Recipe:
    platforms = target.request.platforms if target.request else ()
    return _Recipe(target.login, target.registry, target.repository, source, target.config, platforms)


def _choose(recipe: _Recipe, entries: tuple[IndexEntry, ...]) -> dict[int, IndexEntry]:
    """The entries to rewrite, by position: those of the platforms asked for, else every platform's image.

    Attestations, which are listed for ``unknown/unknown``, and manifests of other types stay as they are.
    """
    wanted = [parse_platform(text) for text in recipe.platforms]
    return {
        position: entry
        for position, entry in enumerate(entries)
        if (platform := entry.platform) is not None
        and platform.os != "unknown"
        and entry.descriptor.media_type in MANIFEST_TYPES
        and (not wanted or any(p.matches(platform.os, platform.architecture, platform.variant) for p in wanted))
    }


def _kind(manifest: Manifest) -> str:
    if manifest.config is not None and manifest.config.media_type not in CONFIG_TYPES:
        return f"{manifest.media_type} with a config of type {manifest.config.media_type or 'unknown'}"
    return manifest.media_type

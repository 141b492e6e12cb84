"""Mirrors: an image copied to another registry with all its platforms, byte for byte.

It is read through wave-proxy, and what is pushed streams from there: neither memory nor this machine's disk holds a
blob. Blobs that the target has are not sent, so that a mirror which begins anew goes on where the last one was.
"""

import asyncio
from collections.abc import AsyncIterable, Callable, Iterator
from contextlib import contextmanager, suppress

from builder.failures import BuildFailed, timed_out
from builder.lending import Lending
from builder.logbook import LogBook
from builder.progress import Progress
from builder.source import Source
from builder.work import Confirm
from builder.workspace import Workspaces
from wave_proxy.errors import (
    BlobUnknown,
    Denied,
    ManifestUnknown,
    NameUnknown,
    StateUnavailable,
    TooManyRequests,
    WaveError,
)
from wave_proxy.image.build import BuildRecord, BuildSpec
from wave_proxy.image.oci import Descriptor
from wave_proxy.image.reference import Reference, parse_reference
from wave_proxy.state.blob_places import BlobPlaces
from wave_proxy.upstream.layout import Content
from wave_proxy.upstream.publish import push
from wave_proxy.upstream.registry import Registry

OpenRegistry = Callable[[], Registry]
"""A client without logins, whose troubles with one mirror are not those of another; the caller closes it."""


class Mirrors:
    """Copies images. ``registry`` is the client for targets, ``places`` knows where blobs are in these."""

    def __init__(
        self,
        workspaces: Workspaces,
        registry: Registry,
        lending: Lending,
        places: BlobPlaces,
        open_source: OpenRegistry,
    ) -> None:
        self._workspaces = workspaces
        self._places = places
        self._registry = registry
        self._lending = lending
        self._open_source = open_source

    async def run(self, record: BuildRecord, book: LogBook, confirm: Confirm) -> str:
        """As Work has it; the digest is that of source and target."""
        spec = record.spec
        book.say(f"mirror {record.build_id}, attempt {max(record.attempt, 1)}")
        book.say(f"from {spec.source_image}")
        book.say(f"to {spec.target_image}")
        try:
            # The workspace holds nothing: it tells the next builder at once whose job this was, should this one die.
            async with asyncio.timeout(spec.timeout_s) as limit, self._workspaces.open(record):
                return await self._copy(spec, book, confirm)
        except TimeoutError:
            if not limit.expired():
                raise
            raise timed_out(spec.timeout_s, "mirror") from None

    async def _copy(self, spec: BuildSpec, book: LogBook, confirm: Confirm) -> str:
        image, reader = parse_reference(spec.source_image), self._open_source()
        try:
            async with self._lending.lend(spec, image) as path:
                # By digest: of a tag wave-proxy may know for a while what it was before.
                place = Reference(self._lending.authority, path, spec.source_digest or image.reference)
                lent, name = f"{place.registry}/{path}", f"{image.registry}/{image.repository}"
                book.hide(lent, name)
                book.hide(path, image.repository)
                with _named({lent: name, path: image.repository}):
                    source = Source(reader, place, book.say)
                    with _reading():
                        content = await source.read()
                    await confirm()
                    return await self._push(content, source, spec, book)
        finally:
            await reader.close()

    async def _push(self, content: Content, source: Source, spec: BuildSpec, book: LogBook) -> str:
        registry = self._registry.acting_for(spec.identity.local_email, spec.logins)
        target = parse_reference(spec.target_image)
        progress = Progress(content, book.say)
        book.say(f"{_described(content)}; {progress.size}")
        for blob in source.skipped.values():
            book.say(f"{blob.digest[:19]} is left out: {blob.media_type} is not to be copied")

        def open_blob(blob: Descriptor, start: int) -> AsyncIterable[bytes]:
            return progress.watch(blob, start, source.open(blob, start))

        with _pushing(source):
            digest = await push(
                registry,
                content,
                open_blob,
                target,
                on_progress=book.say,
                on_blob=progress.note,
                mount_from=await self._find_places(target, progress.digests),
            )
        with suppress(StateUnavailable):
            await self._places.keep(target.registry, target.repository, progress.digests)
        progress.say()
        book.say(f"mirrored {target}@{digest}")
        return digest

    async def _find_places(self, target: Reference, digests: list[str]) -> dict[str, str]:
        """Where else in the target's registry these blobs may be, as ``push`` has it."""
        if target.registry == self._lending.authority:
            return dict.fromkeys(digests, "")  # our own registry knows that itself
        try:
            found = await self._places.find(target.registry, digests)
        except StateUnavailable:
            return {}
        return {digest: place for digest, place in found.items() if place != target.repository}


def _described(content: Content) -> str:
    if not content.children:
        return f"one manifest, {content.digest}"
    return f"an index of {len(content.children)} manifests, {content.digest}"


# --- why it failed -----------------------------------------------------------------------------------------------


@contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except WaveError as err:
        raise BuildFailed(_reason("source", err)) from None


@contextmanager
def _pushing(source: Source) -> Iterator[None]:
    try:
        yield
    except WaveError as err:
        is_sources = any(err is failure for failure in source.failures.values())
        raise BuildFailed(_reason("source" if is_sources else "target", err)) from None


@contextmanager
def _named(names: dict[str, str]) -> Iterator[None]:
    """Reasons speak of the image as it is known, not of the name that it was lent under."""
    try:
        yield
    except BuildFailed as err:
        reason = err.reason
        for lent, name in names.items():
            reason = reason.replace(lent, name)
        raise BuildFailed(reason, err.exit_status) from None


def _reason(side: str, err: WaveError) -> str:
    match err:
        case TooManyRequests():
            when = f"try again in {err.retry_after_s} s" if err.retry_after_s else "try again later"
            return f"{side} limits requests (429), {when}: {err}"
        case Denied() if side == "source":
            return "source denied: its registry does not let us read it with the login that applies to who asked"
        case Denied():
            return f"{side} denied: {err}"
        case ManifestUnknown() | NameUnknown() | BlobUnknown():
            return f"{side} not found: {err}"
    return f"{side} can't be {'read' if side == 'source' else 'written'}: {err}"

"""Pushing an image to a registry: only what that lacks, and the manifest when all that it names is there."""

import asyncio
from collections.abc import AsyncIterable, Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from re import compile as compile_pattern
from typing import TypeVar
from urllib.parse import quote

from aiohttp import ClientResponse

from wave_proxy.errors import (
    ContentMismatch,
    Denied,
    NameUnknown,
    TooManyRequests,
    UpstreamError,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from wave_proxy.image.oci import Descriptor
from wave_proxy.image.reference import Reference
from wave_proxy.image.size import format_size
from wave_proxy.upstream.egress import Body
from wave_proxy.upstream.layout import Content, read_blob_file, read_layout
from wave_proxy.upstream.patience import patiently
from wave_proxy.upstream.registry import PushRequest, Registry

T = TypeVar("T")

_PARALLEL = 3

_CREATED = frozenset({201})
_CREATED_OR_ACCEPTED = frozenset({201, 202})
_TAKEN = frozenset({202, 204})
_THERE_OR_NOT = frozenset({200, 400, 403, 404, 405, 501})  # 403 is what object stores say to a HEAD
_STORED_OR_REFUSED = frozenset({201, 204, 400, 404, 405, 411, 415, 416, 501})
_PROGRESS = frozenset({200, 204, 400, 404, 405, 416, 501})

_RANGE = compile_pattern(r"(?:bytes=)?0-([0-9]{1,18})")

OpenBlob = Callable[[Descriptor, int], AsyncIterable[bytes]]
"""Gives a blob's bytes from an offset on."""

Say = Callable[[str], None]

OnBlob = Callable[[Descriptor, bool], None]
"""Is told of each blob that the repository has now, and whether it was sent for that."""


async def publish(registry: Registry, layout: Path, reference: Reference, *, on_progress: Say) -> str:
    """Push what an OCI image layout (a folder) holds; returns its digest, as the registry confirmed it.

    Raises ContentMismatch and UpstreamError for a layout that is none, and what ``push`` raises.
    """
    content = await asyncio.to_thread(read_layout, layout)

    def open_file(blob: Descriptor, start: int) -> AsyncIterable[bytes]:
        return read_blob_file(layout, blob.digest, start)

    return await push(registry, content, open_file, reference, on_progress=on_progress)


async def push(
    registry: Registry,
    content: Content,
    open_blob: OpenBlob,
    reference: Reference,
    *,
    on_progress: Say,
    on_blob: OnBlob | None = None,
    mount_from: Mapping[str, str] | None = None,
) -> str:
    """Push an image whose blobs come from ``open_blob``; returns its digest. ``on_progress`` is told in words.

    ``mount_from`` says in which repository of the same registry a blob may be, by digest; empty for a registry that
    finds it by itself. What fails for a time is tried again, after the time that the registry asks for; an upload that
    broke off goes on where the registry says.
    Raises Denied, NameUnknown, TooManyRequests, UpstreamError, UpstreamUnavailable, UpstreamTimeout.
    """
    return await _Push(registry, reference, open_blob, on_progress, on_blob, mount_from or {}).run(content)


# --- pushing -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Upload:
    """A blob on its way: where the registry takes it (empty: nowhere yet), and how much it has got."""

    blob: Descriptor
    location: str = ""
    offset: int = 0
    mounted: bool = False


class _Push:
    def __init__(
        self,
        registry: Registry,
        target: Reference,
        open_blob: OpenBlob,
        say: Say,
        on_blob: OnBlob | None,
        mount_from: Mapping[str, str],
    ) -> None:
        self._registry = registry
        self._target = target
        self._name = f"{target.registry}/{target.repository}"
        self._open = open_blob
        self._say = say
        self._on_blob = on_blob
        self._mount_from = mount_from
        self._by_patch = False  # the registry does not take a blob with a single PUT
        self._slots = asyncio.Semaphore(_PARALLEL)

    async def run(self, content: Content) -> str:
        if self._target.is_digest and self._target.reference != content.digest:
            raise ContentMismatch(f"the image has the digest {content.digest} and can't be pushed as {self._target}")
        return await self._put_image(content, self._target.reference)

    async def _put_image(self, content: Content, reference: str) -> str:
        for child in content.children:
            await self._put_image(child, child.digest)
        try:
            async with asyncio.TaskGroup() as group:
                for blob in content.blobs:
                    group.create_task(self._put_blob(blob))
        except BaseExceptionGroup as several:
            raise several.exceptions[0] from None
        return await self._patiently(f"manifest {reference}", lambda: self._put_manifest(content, reference))

    async def _put_manifest(self, content: Content, reference: str) -> str:
        headers = {"Content-Type": content.media_type}
        request = self._request(
            "PUT", f"manifests/{reference}", f"the manifest of {self._name}", headers=headers, body=content.manifest
        )
        response = await self._registry.push(request, _CREATED)
        told = response.headers.get("Docker-Content-Digest", "")
        response.release()
        if not told:
            target = self._target
            told = (await self._registry.head_manifest(target.registry, target.repository, reference)).digest
        if told != content.digest:
            raise UpstreamError(f"{self._name} says that it stored {told}, and {content.digest} was sent")
        return content.digest

    # --- blobs ---------------------------------------------------------------------------------------------------

    async def _put_blob(self, blob: Descriptor) -> None:
        name = f"{blob.digest[:19]} ({format_size(blob.size)})"
        async with self._slots:
            is_there = await self._patiently(name, lambda: self._has(blob))
            self._say(f"{name} is {'there already' if is_there else 'being sent'}")
            upload = _Upload(blob)
            if not is_there:
                await self._patiently(name, lambda: self._send(upload))
            if self._on_blob is not None:
                self._on_blob(blob, not (is_there or upload.mounted))

    async def _has(self, blob: Descriptor) -> bool:
        request = self._request("HEAD", f"blobs/{blob.digest}", f"{self._name}@{blob.digest}")
        response = await self._registry.push(request, _THERE_OR_NOT)
        response.release()
        return response.status == 200

    async def _send(self, upload: _Upload) -> None:
        """One attempt; the next one goes on where this one has come to."""
        if upload.location:
            await self._resume(upload)
        if not upload.location and await self._begin(upload):
            return
        if not upload.offset and not self._by_patch:
            if await self._put_whole(upload):
                return
            self._by_patch = True
            if await self._begin(upload):
                return
        if upload.offset < upload.blob.size:
            await self._patch(upload)
        await self._finish(upload)

    async def _begin(self, upload: _Upload) -> bool:
        """Open an upload; True when the registry has taken the blob out of another repository."""
        digest, source = upload.blob.digest, self._mount_from.get(upload.blob.digest)
        response = await self._mount(digest, source) if source is not None else None
        if response is None:
            request = self._request("POST", "blobs/uploads/", f"an upload to {self._name}", body=b"")
            response = await self._registry.push(request, _TAKEN)
        response.release()
        upload.mounted = response.status == 201
        if upload.mounted:
            self._say(f"{digest[:19]} is lent by {source or 'another repository'}")
            return True
        upload.location, upload.offset = self._registry.upload_location(response, self._target.registry), 0
        return False

    async def _mount(self, digest: str, source: str) -> ClientResponse | None:
        """None when the registry does not want to hear of it."""
        path = f"blobs/uploads/?mount={quote(digest, safe=':')}"
        request = self._request("POST", path, f"a blob of {source} in {self._name}", body=b"", mount=source)
        try:
            return await self._registry.push(request, _CREATED_OR_ACCEPTED)
        except (UpstreamUnavailable, UpstreamTimeout, TooManyRequests):
            raise
        except (Denied, NameUnknown, UpstreamError):
            return None

    async def _resume(self, upload: _Upload) -> None:
        """Find out how much the registry has got; where it does not tell, the upload has to begin anew."""
        location, upload.location = upload.location, ""
        try:
            response = await self._registry.push(self._request("GET", location, "an upload"), _PROGRESS)
        except (Denied, NameUnknown):
            return
        response.release()
        match = _RANGE.fullmatch(response.headers.get("Range", ""))
        # `0-0` says nothing: registries that have one byte say so, and those that have none.
        if response.status not in (200, 204) or match is None or not 0 < int(match[1]) < upload.blob.size:
            return
        moved = "Location" in response.headers
        upload.location = self._registry.upload_location(response, self._target.registry) if moved else location
        upload.offset = int(match[1]) + 1
        self._say(f"{upload.blob.digest[:19]} goes on at byte {upload.offset}")

    async def _put_whole(self, upload: _Upload) -> bool:
        """False when the registry does not take a blob this way."""
        response = await self._registry.push(self._carrying("PUT", _with_digest(upload), upload), _STORED_OR_REFUSED)
        response.release()
        if response.status not in (201, 204):
            return False
        self._check(response, upload.blob)
        return True

    async def _patch(self, upload: _Upload) -> None:
        request = self._carrying("PATCH", upload.location, upload)
        response = await self._registry.push(request, _TAKEN)
        response.release()
        if "Location" in response.headers:
            upload.location = self._registry.upload_location(response, self._target.registry)
        upload.offset = upload.blob.size

    async def _finish(self, upload: _Upload) -> None:
        request = self._request("PUT", _with_digest(upload), f"a blob of {self._name}", body=b"")
        response = await self._registry.push(request, _CREATED | {204})
        response.release()
        self._check(response, upload.blob)

    def _check(self, response: ClientResponse, blob: Descriptor) -> None:
        told = response.headers.get("Docker-Content-Digest", blob.digest)
        if told != blob.digest:
            raise UpstreamError(f"{self._name} says that it stored {told}, and {blob.digest} was sent")

    # --- asking --------------------------------------------------------------------------------------------------

    def _carrying(self, method: str, target: str, upload: _Upload) -> PushRequest:
        """A request with what is left of the blob."""
        blob, offset = upload.blob, upload.offset
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(blob.size - offset)}
        if offset:
            headers["Content-Range"] = f"{offset}-{blob.size - 1}"
        body = partial(self._open, blob, offset)
        return self._request(method, target, f"a blob of {self._name}", headers=headers, body=body)

    def _request(
        self,
        method: str,
        target: str,
        what: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: Body | None = None,
        mount: str = "",
    ) -> PushRequest:
        place = self._target
        return PushRequest(method, place.registry, place.repository, target, what, headers or {}, body, mount)

    async def _patiently(self, what: str, operation: Callable[[], Awaitable[T]]) -> T:
        return await patiently(what, operation, self._say)


def _with_digest(upload: _Upload) -> str:
    mark = "&" if "?" in upload.location else "?"
    return f"{upload.location}{mark}digest={quote(upload.blob.digest, safe='')}"

"""How far a copy of an image is, in words for a job's log."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from time import monotonic

from wave_proxy.image.oci import Descriptor
from wave_proxy.image.size import format_size
from wave_proxy.upstream.layout import Content

_INTERVAL_S = 3.0


class Progress:
    """Counts the blobs of an image, and their bytes. A blob that several manifests name is one blob."""

    def __init__(self, content: Content, say: Callable[[str], None]) -> None:
        self._say = say
        self._blobs = {blob.digest: blob.size for blob in _blobs_of(content)}
        self._sent: dict[str, int] = {}  # by digest, how far
        self._there: set[str] = set()
        self._done: set[str] = set()
        self._said = ""
        self._said_at = monotonic()

    @property
    def digests(self) -> list[str]:
        """Of all blobs."""
        return list(self._blobs)

    @property
    def size(self) -> str:
        """Of all blobs, such as ``12 blobs, 900.0 MB``."""
        return f"{len(self._blobs)} blobs, {format_size(sum(self._blobs.values()))}"

    def note(self, blob: Descriptor, was_sent: bool) -> None:
        """The target has that blob now."""
        if blob.digest in self._done or blob.digest in self._there:
            return  # as another manifest names it too
        (self._done if was_sent else self._there).add(blob.digest)
        if was_sent:
            self._sent[blob.digest] = blob.size

    async def watch(self, blob: Descriptor, start: int, chunks: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
        """The bytes of a blob from ``start`` on, as they are sent; now and then says how far it is."""
        self._sent[blob.digest] = start
        async with aclosing(chunks):
            async for chunk in chunks:
                yield chunk
                self._sent[blob.digest] += len(chunk)
                if monotonic() - self._said_at > _INTERVAL_S:
                    self.say()

    def say(self) -> None:
        """Say how far it is, unless that was said."""
        to_send = {digest: size for digest, size in self._blobs.items() if digest not in self._there}
        sent = sum(self._sent.get(digest, 0) for digest in to_send)
        size = format_size(sum(to_send.values()))
        text = f"sent {len(self._done)} of {len(to_send)} blobs, {format_size(sent)} of {size}"
        if self._there:
            text += f"; {len(self._there)} did not have to be"
        self._said_at = monotonic()
        if text != self._said:
            self._said = text
            self._say(text)


def _blobs_of(content: Content) -> list[Descriptor]:
    return [*content.blobs, *(blob for child in content.children for blob in _blobs_of(child))]

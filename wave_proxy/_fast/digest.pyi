from typing import final

@final
class Verifier:
    """Checks a stream of bytes against a digest and, when known, a size."""

    def __init__(self, digest: str, size: int = -1) -> None:
        """``digest`` is ``sha256:…`` or ``sha512:…``, well formed; ``size`` is bytes, -1 when unknown."""

    @property
    def size(self) -> int:
        """Bytes seen so far."""

    def update(self, chunk: bytes) -> None:
        """Take the next bytes.

        Raises SizeMismatch as soon as there are more than announced; the chunk is then not counted.
        """

    def finish(self) -> None:
        """End of the stream. Raises SizeMismatch when bytes are missing, DigestMismatch when they are other ones."""

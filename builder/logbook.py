"""A build's log on its way to the state store: cleaned line by line, sent as it appears, the Conda lock taken out."""

import asyncio
import re
from collections.abc import Awaitable, Callable

from wave_proxy.image.build import LOCK_END, LOCK_START

_PAUSE_S = 0.2  # between two appends
_PIECE_BYTES = 256 << 10
_MAX_LINE_BYTES = 64 << 10

_ESCAPES = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]+[0-~]|[0-~])|[\x00-\x08\x0b-\x1f\x7f]"
)
_STEP_PREFIX = re.compile(r"#\d+ \d+\.\d+ ")  # BuildKit's


class LogBook:
    """Takes what a build writes at once, and sends it on in ``run``, which ends when the book is closed.

    ``append`` sends a piece; what it raises ends ``run``. ``lock`` is the last whole block between the markers of a
    Conda lock, None when there was none; ``echoed_lock`` says that the commands which print one were shown.
    """

    def __init__(self, append: Callable[[bytes], Awaitable[None]]) -> None:
        self._append = append
        self._rest = b""  # of a line
        self._ready: list[bytes] = []
        self._changed = asyncio.Event()
        self._closed = asyncio.Event()
        self._names: list[tuple[str, str]] = []
        self._inside: list[str] | None = None  # the lines of a lock that has begun
        self.lock: bytes | None = None
        self.echoed_lock = False

    def hide(self, text: str, shown: str) -> None:
        """Show ``text`` as ``shown`` from now on."""
        self._names.append((text, shown))

    def shown(self, text: str) -> str:
        """The text with what is hidden replaced."""
        for hidden, shown in self._names:
            text = text.replace(hidden, shown)
        return text

    def write(self, text: bytes) -> None:
        """Take the next bytes, which need not be whole lines."""
        *lines, self._rest = (self._rest + text).split(b"\n")
        if len(self._rest) > _MAX_LINE_BYTES:
            lines.append(self._rest)
            self._rest = b""
        for line in lines:
            self._take(line)

    def say(self, line: str) -> None:
        """A line of the builder's own."""
        if self._rest:
            self.write(b"\n")
        self.write(f">> {' '.join(line.split())}\n".encode())

    def close(self) -> None:
        """Nothing more comes: ``run`` sends what is left, and ends."""
        if self._rest:
            self.write(b"\n")
        if self._inside is not None:  # the lock's end never came
            unfinished, self._inside = [LOCK_START, *self._inside], None
            self._ready.extend(f"{line}\n".encode() for line in unfinished)
        self._closed.set()
        self._changed.set()

    async def run(self) -> None:
        """Send lines soon after they come, until the book is closed and all is sent."""
        while not (self._closed.is_set() and not self._ready):
            await self._changed.wait()
            self._changed.clear()
            content, self._ready = b"".join(self._ready), []
            for start in range(0, len(content), _PIECE_BYTES):
                await self._append(content[start : start + _PIECE_BYTES])
            await self._rest_a_little()

    async def _rest_a_little(self) -> None:
        try:
            async with asyncio.timeout(_PAUSE_S):
                await self._closed.wait()
        except TimeoutError:
            pass

    def _take(self, raw: bytes) -> None:
        line = _clean(raw)
        bare = _STEP_PREFIX.sub("", line, count=1).strip()
        if bare == LOCK_START:
            self._inside = []
        elif bare == LOCK_END and self._inside is not None:
            self.lock, self._inside = "".join(f"{line}\n" for line in self._inside).encode(), None
        elif self._inside is not None:
            self._inside.append(_STEP_PREFIX.sub("", line, count=1))
        else:
            self.echoed_lock = self.echoed_lock or LOCK_START in line
            self._ready.append(f"{self.shown(line)}\n".encode())
            self._changed.set()


def _clean(raw: bytes) -> str:
    """The line as a terminal would show it in the end, without colours."""
    text = raw.decode(errors="replace").removesuffix("\r")
    return _ESCAPES.sub("", text.rpartition("\r")[2])

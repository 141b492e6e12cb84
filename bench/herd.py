"""Many clients that pull one image at the same moment, as Docker does, and check every byte that they get."""

import asyncio
import json
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import chain
from multiprocessing.connection import Connection as Pipe
from platform import machine
from time import monotonic
from types import TracebackType
from typing import Any, Literal, Self, cast

import httptools
import uvloop

from bench.children import child, raise_file_limit
from wave_proxy.image.oci import ACCEPT_MANIFESTS, INDEX_TYPES
from wave_proxy.image.reference import Reference, parse_reference

ANSWER_LIMIT_S = 900.0  # for one answer with its whole body: slow machines have hundreds of clients too
_BLOBS_AT_ONCE = 3  # of one client; Docker's default


class PullFailed(Exception):
    """An answer that a careful client does not accept; says which and why."""


@dataclass(frozen=True, slots=True)
class Pull:
    """What one client got. Instants are seconds of the machine's monotonic clock; ``size`` is bytes of all bodies."""

    began: float
    ended: float
    first_byte: float = 0.0  # of the first layer to arrive
    size: int = 0
    digest: str = ""  # of the manifest, the platform's where the name stands for an index
    manifest: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    verified: int = 0  # how many digests were checked
    error: str = ""

    @property
    def duration_s(self) -> float:
        """From the first connection to the last byte."""
        return self.ended - self.began


@dataclass(frozen=True, slots=True)
class Load:
    """How long each of many requests for one manifest took, in seconds, and all of them together."""

    latencies_s: Sequence[float]
    duration_s: float


def wall_s(pulls: Sequence[Pull]) -> float:
    """Seconds from the first client's start to the last one's end."""
    return max(pull.ended for pull in pulls) - min(pull.began for pull in pulls)


def quantile(values: Sequence[float], part: float) -> float:
    """The value that ``part`` (0 to 1) of the others do not exceed."""
    return sorted(values)[min(int(part * len(values)), len(values) - 1)]


# --- one connection --------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Answer:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)  # names in lower case
    size: int = 0
    digest: str = ""
    first_byte: float = 0.0
    body: bytes = b""  # where it was to be kept


class _Connection(asyncio.Protocol):
    """Requests one after the other; bodies are hashed as they arrive, so that memory stays small."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._done: asyncio.Future[_Answer] | None = None

    def ask(self, method: str, path: str, headers: str, *, keep: bool = False) -> "asyncio.Future[_Answer]":
        """Send a request. The answer's future raises PullFailed when the answer breaks off."""
        assert self._transport is not None
        self._method, self._path, self._keep = method, path, keep
        self._answer, self._hash, self._kept = _Answer(), sha256(), list[bytes]()
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(f"{method} {path} HTTP/1.1\r\n{headers}\r\n".encode())
        return self._done

    def close(self) -> None:
        """Hang up."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not derive from it

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as err:
            self._fail(f"the answer is not HTTP: {err}")

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(f"the connection ended after {self._answer.size} bytes of the body" if self._done else "")

    def _fail(self, text: str) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(PullFailed(f"{self._method} {self._path}: {text}"))
        self.close()

    # Called by the parser.

    def on_header(self, name: bytes, value: bytes) -> None:
        self._answer.headers[name.decode().lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self._answer.status = self._parser.get_status_code()
        if self._method == "HEAD":
            self.on_message_complete()  # the parser, which does not know that, would wait for the body

    def on_body(self, chunk: bytes) -> None:
        answer = self._answer
        if not answer.size:
            answer.first_byte = monotonic()
        answer.size += len(chunk)
        self._hash.update(chunk)
        if self._keep or answer.status != 200:
            self._kept.append(chunk)

    def on_message_complete(self) -> None:
        self._answer.digest = f"sha256:{self._hash.hexdigest()}"
        self._answer.body = b"".join(self._kept)
        if self._done is not None and not self._done.done():
            self._done.set_result(self._answer)


# --- one client ------------------------------------------------------------------------------------------------------


class _Client:
    """Has Docker's habits: a connection a request, the tag's HEAD first, then by digest, three blobs at once."""

    def __init__(self, address: tuple[str, int], image: Reference) -> None:
        self._address = address
        self._base = f"/v2/{image.repository}"
        self._reference = image.reference
        self._head = f"Host: {image.registry}\r\nUser-Agent: docker/28 (bench.herd)\r\nConnection: close\r\n"
        self._free = asyncio.Semaphore(_BLOBS_AT_ONCE)
        self._size = self._verified = 0
        self._first_byte = 0.0

    async def pull(self) -> Pull:
        """Pull the image, for this machine's platform where there are several. Never raises what a server can cause."""
        began = monotonic()
        try:
            return await self._pull(began)
        except (PullFailed, OSError, TimeoutError, LookupError, TypeError, ValueError) as err:
            return Pull(began, monotonic(), error=_told(err))
        except ExceptionGroup as group:
            return Pull(began, monotonic(), error=_told(group.exceptions[0]))

    async def _pull(self, began: float) -> Pull:
        accept = f"Accept: {ACCEPT_MANIFESTS}\r\n"
        head = await self._request("HEAD", f"/manifests/{self._reference}", accept)
        digest = head.headers["docker-content-digest"]
        manifest = await self._manifest(digest, int(head.headers["content-length"]))
        if manifest["mediaType"] in INDEX_TYPES:
            child = _choose(manifest["manifests"])
            digest = child["digest"]
            manifest = await self._manifest(digest, child["size"])
        async with asyncio.TaskGroup() as tasks:
            config = tasks.create_task(self._blob(manifest["config"], keep=True))
            for layer in manifest["layers"]:
                tasks.create_task(self._blob(layer))
        return Pull(
            began,
            monotonic(),
            self._first_byte,
            self._size,
            digest,
            manifest,
            json.loads(config.result()),
            self._verified,
        )

    async def _manifest(self, digest: str, size: int) -> dict[str, Any]:
        answer = await self._request("GET", f"/manifests/{digest}", f"Accept: {ACCEPT_MANIFESTS}\r\n", keep=True)
        self._verify(f"manifest {digest}", answer, digest, size)
        document: dict[str, Any] = json.loads(answer.body)
        document.setdefault("mediaType", answer.headers["content-type"])
        return document

    async def _blob(self, descriptor: Mapping[str, Any], *, keep: bool = False) -> bytes:
        digest: str = descriptor["digest"]
        async with self._free:
            answer = await self._request("GET", f"/blobs/{digest}", keep=keep)
        self._verify(f"blob {digest}", answer, digest, descriptor["size"])
        if not keep:
            self._first_byte = min(self._first_byte or answer.first_byte, answer.first_byte)
        return answer.body

    def _verify(self, what: str, answer: _Answer, digest: str, size: int) -> None:
        if answer.size != size:
            raise PullFailed(f"{what} has {answer.size} bytes, not {size}")
        if answer.digest != digest:
            raise PullFailed(f"{what} came with other content: {answer.digest}")
        self._verified += 1

    async def _request(self, method: str, path: str, headers: str = "", *, keep: bool = False) -> _Answer:
        path = self._base + path
        async with asyncio.timeout(ANSWER_LIMIT_S):
            _, connection = await asyncio.get_running_loop().create_connection(_Connection, *self._address)
            try:
                answer = await connection.ask(method, path, self._head + headers, keep=keep)
            finally:
                connection.close()
        self._size += answer.size
        if answer.status != 200:
            raise PullFailed(f"{method} {path}: status {answer.status} {answer.body[:300].decode(errors='replace')}")
        return answer


def _told(err: BaseException) -> str:
    return str(err) if isinstance(err, PullFailed) else f"{type(err).__name__}: {err}"


def _choose(entries: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The entry of an index for this machine, else the first."""
    here = {"x86_64": "amd64", "aarch64": "arm64"}.get(machine(), machine())
    return next((entry for entry in entries if entry.get("platform", {}).get("architecture") == here), entries[0])


async def _find_address(registry: str) -> tuple[str, int]:
    """Where ``host:port`` answers: looked up and tried once, so that what is measured is the server."""
    host, _, port = registry.rpartition(":")
    transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, host.strip("[]"), int(port))
    peer: tuple[str, int] = transport.get_extra_info("peername")[:2]
    transport.close()
    return peer


# --- a process of clients --------------------------------------------------------------------------------------------


async def _pull_all(image: Reference, clients: int) -> list[Pull]:
    address = await _find_address(image.registry)
    return await asyncio.gather(*(_Client(address, image).pull() for _ in range(clients)))


async def _ask_all(image: Reference, clients: int, duration_s: float) -> list[float]:
    address = await _find_address(image.registry)
    deadline = monotonic() + duration_s
    async with asyncio.TaskGroup() as tasks:
        started = [tasks.create_task(_ask_until(deadline, address, image)) for _ in range(clients)]
    return list(chain.from_iterable(task.result() for task in started))


async def _ask_until(deadline: float, address: tuple[str, int], image: Reference) -> list[float]:
    """Get one manifest again and again on one connection; the latencies in seconds."""
    _, connection = await asyncio.get_running_loop().create_connection(_Connection, *address)
    path = f"/v2/{image.repository}/manifests/{image.reference}"
    headers = f"Host: {image.registry}\r\nAccept: {ACCEPT_MANIFESTS}\r\n"
    latencies: list[float] = []
    try:
        while (began := monotonic()) < deadline:
            async with asyncio.timeout(ANSWER_LIMIT_S):
                answer = await connection.ask("GET", path, headers)
            if answer.status != 200 or answer.digest != answer.headers.get("docker-content-digest"):
                raise PullFailed(f"GET {path}: status {answer.status}, content {answer.digest}")
            latencies.append(monotonic() - began)
    finally:
        connection.close()
    return latencies


def _work(pipe: Pipe) -> None:
    """A child process: does what comes through the pipe until that is closed."""
    raise_file_limit()
    with suppress(EOFError, BrokenPipeError):
        pipe.send("ready")
        while True:
            pipe.send(_outcome(*pipe.recv()))


def _outcome(kind: Literal["pull", "ask"], arguments: Sequence[Any]) -> list[Any] | PullFailed:
    work: Coroutine[None, None, list[Any]] = (_pull_all if kind == "pull" else _ask_all)(*arguments)
    try:
        return uvloop.run(work)
    except (PullFailed, OSError) as err:
        return PullFailed(_told(err))
    except ExceptionGroup as group:
        return PullFailed(_told(group.exceptions[0]))


class Herd:
    """Clients, spread over processes of their own. A context manager; the processes end with it."""

    def __init__(self, processes: int) -> None:
        self._count = processes
        self._stack = ExitStack()
        self._children: list[Pipe] = []

    def __enter__(self) -> Self:
        self._children = [self._stack.enter_context(child(_work)) for _ in range(self._count)]
        for pipe in self._children:
            pipe.recv()  # the first pull shall not wait for imports
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def pull(self, image: str, clients: int) -> list[Pull]:
        """Pull ``host:port/repository:tag`` with so many clients at once; what failed says so in its Pull.

        Raises PullFailed when nothing could be tried.
        """
        return self._share("pull", image, clients)

    def ask(self, image: str, clients: int, duration_s: float) -> Load:
        """Get the manifest of an image on so many connections for so long. Raises PullFailed."""
        began = monotonic()
        latencies: list[float] = self._share("ask", image, clients, duration_s)
        return Load(latencies, monotonic() - began)

    def _share(self, kind: Literal["pull", "ask"], image: str, clients: int, *arguments: float) -> list[Any]:
        reference = parse_reference(image)
        for number, pipe in enumerate(self._children):
            share = len(range(number, clients, self._count))
            pipe.send((kind, (reference, share, *arguments)))
        try:
            results: list[list[Any] | PullFailed] = [pipe.recv() for pipe in self._children]
        except EOFError:
            raise PullFailed("a process of clients ended before its work did") from None
        merged: list[Any] = []
        for result in results:
            if isinstance(result, PullFailed):
                raise result
            merged += result
        return merged

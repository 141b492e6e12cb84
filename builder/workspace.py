"""A build's own folder: its container file, its context, and room for what the engine makes; removed at the end."""

import asyncio
import fcntl
import json
import os
import re
import shutil
from asyncio import create_subprocess_exec
from asyncio.subprocess import DEVNULL, PIPE
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from copy import copy
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC
from hashlib import new as new_hash
from pathlib import Path
from secrets import token_hex
from threading import Event
from typing import BinaryIO, TypeVar

import structlog

from builder.failures import NOT_BUILT, BuildFailed
from builder.unpack import check_tar, unpack
from wave_proxy.errors import (
    DigestMismatch,
    SizeMismatch,
    StateUnavailable,
    UpstreamTimeout,
    UpstreamUnavailable,
    WaveError,
)
from wave_proxy.image.build import BuildRecord, BuildSpec, split_build_id
from wave_proxy.image.request import Layer, unpack_inline_layer
from wave_proxy.state.tokens import TokenStore
from wave_proxy.upstream.credentials import Login
from wave_proxy.upstream.registry import Registry
from wave_proxy.upstream.transfer import BlobStream

T = TypeVar("T")

_OTHER_REGISTRY = re.compile(r"docker://([^/]+)/v2/(.+)/blobs/([^/]+)")
_ATTEMPTS = 4
_FIRST_PAUSE_S = 0.5

log = structlog.get_logger()

_STEP = 1 << 20
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW

_Open = Callable[[int], AbstractAsyncContextManager[BlobStream]]
"""Opens a layer's bytes from an offset on, or from its beginning where that can't be had."""


@dataclass(frozen=True, slots=True)
class Workspace:
    """``folder`` holds ``Containerfile`` and ``context/``. Nobody else may look into it."""

    folder: Path

    @property
    def context(self) -> Path:
        """What COPY and ADD may read."""
        return self.folder / "context"

    def write_logins(self, logins: Mapping[str, Login]) -> Path | None:
        """A file with those logins by registry, in Docker's format, that goes with the folder; None without any."""
        if not logins:
            return None
        auths = {
            host: {"auth": b64encode(f"{login.username}:{login.password}".encode()).decode()}
            for host, login in logins.items()
        }
        file = self.folder / "auth.json"
        _write_new(file, json.dumps({"auths": auths}).encode())
        return file


class Workspaces:
    """The workspaces below one folder, which several builders of this machine may share.

    ``max_bytes`` is what a context may unpack to. A builder holds a lock on each of its workspaces for as long as it
    lives, so that another one can tell which of them are left over.
    """

    def __init__(self, folder: Path, registry: Registry, tokens: TokenStore, max_bytes: int) -> None:
        self._folder = folder
        self._registry = registry
        self._tokens = tokens
        self._max_bytes = max_bytes

    @asynccontextmanager
    async def open(self, record: BuildRecord) -> AsyncIterator[Workspace]:
        """A workspace with nothing in it, removed at the end of the block whatever happens in it.

        Raises BuildFailed when there is no room for it.
        """
        if split_build_id(record.build_id) is None:
            raise BuildFailed("the build's id is none", NOT_BUILT)
        folder = self._folder / (record.build_id if record.attempt <= 1 else f"{record.build_id}.{record.attempt}")
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            await remove(folder)
            lock = self._make(folder)
        except OSError as err:
            raise _no_room(err) from None
        try:
            yield Workspace(folder)
        finally:
            await to_its_end(asyncio.create_task(remove(folder)))
            os.close(lock)

    def _make(self, folder: Path) -> int:
        """Make a folder that has its name no sooner than its lock, whose file descriptor is given back.

        Raises OSError.
        """
        while True:
            unnamed = self._folder / f".{token_hex(8)}"
            unnamed.mkdir(mode=0o700)
            lock = _lock(unnamed)
            if lock is None:
                continue  # another builder takes it for left over
            try:
                unnamed.rename(folder)
            except OSError:
                os.close(lock)
                raise
            return lock

    async def remove_leftovers(self) -> list[tuple[str, int]]:
        """Remove the workspaces of builders that were killed: those that nobody has locked.

        Gives the attempts that they were of, by build id and number.
        """
        left = []
        folders = await asyncio.to_thread(lambda: list(self._folder.iterdir()) if self._folder.is_dir() else [])
        for folder in folders:
            lock = _lock(folder)
            if lock is None:
                continue
            try:
                log.info("removing what a killed builder has left", folder=folder.name)
                build_id, _, attempt = folder.name.partition(".")
                if build_id:
                    left.append((build_id, int(attempt) if attempt.isdecimal() else 1))
                await remove(folder)
            finally:
                os.close(lock)
        return left

    async def fill(self, workspace: Workspace, record: BuildRecord) -> None:
        """Put in what the build needs. Raises BuildFailed, StateUnavailable."""
        spec, own = record.spec, copy(self)
        own._registry = self._registry.acting_for(spec.identity.local_email, spec.logins)
        await own._fill(workspace, spec)

    async def _fill(self, workspace: Workspace, spec: BuildSpec) -> None:
        try:
            _write_new(workspace.folder / "Containerfile", spec.container_file.encode())
            workspace.context.mkdir(mode=0o755)
            if spec.context is not None:
                archive = workspace.folder / "context.tar.gz"
                await self.fetch(spec.context, archive, "the build context")
                digest = spec.context.tar_digest
                await _in_thread(lambda stop: unpack(archive, workspace.context, digest, self._max_bytes, stop))
                archive.unlink()
            if spec.conda_file:
                _write_new(workspace.context / "conda.yml", spec.conda_file.encode(), 0o644)
            for layer in spec.layers:
                await self._add_layer(layer, workspace.context)
        except OSError as err:
            raise _no_room(err) from None

    async def _add_layer(self, layer: Layer, context: Path) -> None:
        name = f"layer-{layer.gzip_digest.partition(':')[2]}.tar.gz"
        _make_room(context / name)
        await self.fetch(layer, context / name, "a layer")
        os.chmod(context / name, 0o644)
        await _in_thread(lambda stop: check_tar(context / name, layer.tar_digest, self._max_bytes, stop))

    # --- fetching ------------------------------------------------------------------------------------------------

    async def fetch(self, layer: Layer, file: Path, what: str) -> None:
        """Write the layer's tar.gz into a new file, checked against its digest and size. ``what`` is its name.

        Raises BuildFailed, StateUnavailable.
        """
        try:
            if layer.is_inline:
                _write_new(file, await self._read_inline(layer, what))
                return
            with os.fdopen(os.open(file, _NEW, 0o600), "wb") as target:
                await self._download(layer, target, what)
            await _in_thread(lambda stopped: _check_file(file, layer, what, stopped))
        except StateUnavailable:
            raise
        except WaveError as err:
            raise BuildFailed(f"{what} can't be had: {err}", NOT_BUILT) from None

    async def _read_inline(self, layer: Layer, what: str) -> bytes:
        if layer.location.partition(":")[2]:
            content, _ = await asyncio.to_thread(unpack_inline_layer, layer)
            return content
        kept = await self._tokens.find_layer(layer.gzip_digest)
        if kept is None:
            raise BuildFailed(f"{what} is not kept any more: send the request again", NOT_BUILT)
        return kept

    async def _download(self, layer: Layer, target: BinaryIO, what: str) -> None:
        """Goes on where a connection broke off, a few times."""
        open_at, attempt = self._opener(layer), 1
        while True:
            try:
                async with open_at(target.tell()) as stream:
                    target.seek(stream.start)
                    target.truncate()
                    await _copy(stream, target, layer.gzip_size, what)
                return
            except (UpstreamUnavailable, UpstreamTimeout):
                if attempt == _ATTEMPTS:
                    raise
            await asyncio.sleep(_FIRST_PAUSE_S * attempt)
            attempt += 1

    def _opener(self, layer: Layer) -> _Open:
        size = layer.gzip_size
        if layer.location.startswith(("http://", "https://")):
            return lambda start: self._registry.open_url(layer.location, start=start, size=size)
        match = _OTHER_REGISTRY.fullmatch(layer.location)
        if match is None:
            raise BuildFailed("a layer's location must be data:, gzip:, http(s):// or docker://", NOT_BUILT)
        registry, repository = match[1], match[2]
        digest = layer.gzip_digest
        return lambda start: self._registry.open_blob(registry, repository, digest, start=start, size=size)


async def _copy(stream: BlobStream, target: BinaryIO, size: int, what: str) -> None:
    async for chunk in stream.chunks:
        await asyncio.to_thread(target.write, chunk)
        if target.tell() > size:
            raise SizeMismatch(f"{what} has more than the {size} bytes of its gzipSize")


def _check_file(file: Path, layer: Layer, what: str, stopped: Callable[[], bool]) -> None:
    size = file.stat().st_size
    if size != layer.gzip_size:
        raise SizeMismatch(f"gzipSize is {layer.gzip_size} and {what} has {size} bytes")
    algorithm = layer.gzip_digest.partition(":")[0]
    running = new_hash(algorithm)
    with file.open("rb") as content:
        while not stopped() and (chunk := content.read(_STEP)):
            running.update(chunk)
    if f"{algorithm}:{running.hexdigest()}" != layer.gzip_digest:
        raise DigestMismatch(f"gzipDigest is {layer.gzip_digest} and the one of {what} is {running.hexdigest()}")


# --- files -------------------------------------------------------------------------------------------------------


def _write_new(file: Path, content: bytes, mode: int = 0o600) -> None:
    """In the place of whatever is there, unless that is a folder; a link is not followed."""
    _make_room(file)
    with open(os.open(file, _NEW, mode), "wb") as target:
        target.write(content)


def _make_room(file: Path) -> None:
    if file.is_dir() and not file.is_symlink():
        raise BuildFailed(f"the build context has a folder in the place of {file.name}", NOT_BUILT)
    file.unlink(missing_ok=True)


def _no_room(err: OSError) -> BuildFailed:
    if err.errno in (ENOSPC, EDQUOT):
        return BuildFailed("no space: the builder's disk is full; free some, or give it more", NOT_BUILT)
    return BuildFailed(f"the builder can't write the build's files: {err.strerror}", NOT_BUILT)


def _lock(folder: Path) -> int | None:
    """A file descriptor that holds the folder's lock; None when somebody else has it, or when it is no folder."""
    try:
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(opened)
        return None
    return opened


def _is_there(path: Path) -> bool:
    return os.path.lexists(path)


async def remove(folder: Path) -> None:
    """Remove a folder with files of other users, and with as many levels as somebody liked to make.

    What can't be removed is logged, and stays. Nothing in it is followed, no link and no mount.
    """
    commands = [["rm", "-rf", "--one-file-system", "--"]]
    if os.geteuid() != 0:  # files of a box belong to users that only a namespace may touch
        commands += [["chmod", "-R", "u+rwX", "--"], commands[0], ["buildah", "unshare", *commands[0]]]
    said = b""
    for command in commands:
        if not _is_there(folder):
            return
        # Also where PATH leads to nothing but the program itself.
        if program := shutil.which(command[0]) or shutil.which(command[0], path=os.defpath):
            argv = [program, *command[1:], str(folder)]
            process = await create_subprocess_exec(*argv, stdin=DEVNULL, stdout=DEVNULL, stderr=PIPE)
            _, said = await process.communicate()
    if _is_there(folder):
        log.error("a workspace can't be removed", folder=str(folder), said=said.decode(errors="replace")[-500:])


# --- waiting -----------------------------------------------------------------------------------------------------


async def _in_thread(work: Callable[[Callable[[], bool]], None]) -> None:
    """Run ``work`` in a thread; it is told to stop when the caller is, and ends before the caller does."""
    stop = Event()
    task = asyncio.create_task(asyncio.to_thread(work, stop.is_set))
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        stop.set()
        with suppress(Exception):
            await to_its_end(task)
        raise


async def to_its_end(task: asyncio.Task[T]) -> T:
    """What ``task`` brings; a caller that is cancelled meanwhile ends with that when the task is done."""
    cancelled = False
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            cancelled = True
        except Exception:  # noqa: S110 - the result is asked for below
            pass
    if cancelled and not task.cancelled():
        raise asyncio.CancelledError
    return task.result()

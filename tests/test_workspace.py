"""Workspaces: what is put in, from where, and that nothing of it leads out or is left behind."""

import asyncio
import fcntl
import gzip
import io
import json
import os
import stat
import tarfile
from base64 import b64encode
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from bench.images import blob, digest_of
from bench.images import layer as image_layer
from bench.upstream import Upstream
from builder.failures import BuildFailed
from builder.unpack import ContextInvalid, check_tar, unpack
from builder.workspace import Workspace, Workspaces, remove
from tests.outgoing import answer as http_answer
from tests.outgoing import registry_at, scripted
from wave_proxy.image.build import BuildRecord, BuildSpec
from wave_proxy.image.request import Layer
from wave_proxy.state.redis import Redis, connect
from wave_proxy.state.tokens import TokenStore
from wave_proxy.upstream.credentials import Login

Entry = tuple[tarfile.TarInfo, bytes]

compress = partial(gzip.compress, mtime=0)  # the same bytes whenever it is called
BUILD_ID = f"bd-{'0' * 16}_1"
ROOMY = 1 << 30


def entry(
    name: str, content: bytes = b"", *, kind: bytes = tarfile.REGTYPE, link: str = "", mode: int = 0o644
) -> Entry:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode, info.size, info.mtime = kind, link, mode, len(content), 1_000_000
    return info, content


def tar(*entries: Entry, form: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.TarFile(fileobj=buffer, mode="w", format=form) as archive:
        for info, content in entries:
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def layer_of(plain: bytes, location: str = "", **wrong: str | int) -> Layer:
    packed = compress(plain)
    inline = f"data:{b64encode(packed).decode()}"
    layer = Layer(location or inline, digest_of(packed), len(packed), digest_of(plain))
    return replace(layer, **wrong)  # type: ignore[arg-type]


def record_of(**spec: object) -> BuildRecord:
    return BuildRecord(BUILD_ID, BuildSpec("0" * 16, "r/i:1", "FROM a\n", **spec), "running", 0.0, attempt=1)  # type: ignore[arg-type]


def unpacked(folder: Path, *entries: Entry, max_bytes: int = ROOMY) -> Path:
    """Unpack a tar with those entries into a new folder."""
    plain = tar(*entries)
    (folder / "a.tar.gz").write_bytes(compress(plain))
    (folder / "out").mkdir()
    unpack(folder / "a.tar.gz", folder / "out", digest_of(plain), max_bytes, lambda: False)
    return folder / "out"


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    client = connect(redis_url)
    yield client
    await client.aclose()


@asynccontextmanager
async def workspaces_at(tmp_path: Path, redis: Redis, *upstreams: Upstream) -> AsyncIterator[Workspaces]:
    async with registry_at(*upstreams) as registry:
        yield Workspaces(tmp_path / "builds", registry, TokenStore(redis), ROOMY)


# --- unpacking -------------------------------------------------------------------------------------------------------


def test_files_folders_and_links_are_unpacked(tmp_path: Path) -> None:
    out = unpacked(
        tmp_path,
        entry("./", kind=tarfile.DIRTYPE, mode=0o755),
        entry("./bin/tool", b"#!/bin/sh", mode=0o755),
        entry("closed", kind=tarfile.DIRTYPE, mode=0o500),
        entry("closed/inner", b"x", mode=0o400),
        entry("bin/same", kind=tarfile.LNKTYPE, link="./bin/tool"),
        entry("lib/link", kind=tarfile.SYMTYPE, link="../bin/tool"),
        entry("dangling", kind=tarfile.SYMTYPE, link="nowhere/yet"),
        entry("twice", b"first"),
        entry("twice", b"second"),
        entry("ünïcode \udcff", b"x"),
    )
    assert (out / "lib" / "link").read_text() == "#!/bin/sh"
    assert os.path.samefile(out / "bin" / "same", out / "bin" / "tool")
    assert (out / "bin" / "tool").stat().st_mode & 0o777 == 0o755
    assert (out / "closed").stat().st_mode & 0o777 == 0o700
    assert (out / "closed" / "inner").stat().st_mtime == 1_000_000
    assert (out / "twice").read_text() == "second"
    assert os.readlink(out / "dangling") == "nowhere/yet"
    assert (out / "ünïcode \udcff").exists()


def test_set_user_id_and_the_owner_are_not_taken_over(tmp_path: Path) -> None:
    info, content = entry("tool", b"x", mode=0o6755)
    info.uid = 1234
    out = unpacked(tmp_path, (info, content))
    status = (out / "tool").stat()
    assert stat.S_IMODE(status.st_mode) == 0o755
    assert status.st_uid == os.getuid()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([entry("/etc/passwd", b"x")], "leads out"),
        ([entry("../x", b"x")], "leads out"),
        ([entry("a/../../x", b"x")], "leads out"),
        ([entry("l", kind=tarfile.SYMTYPE, link="/etc")], "leads out"),
        ([entry("l", kind=tarfile.SYMTYPE, link="..")], "leads out"),
        ([entry("a/l", kind=tarfile.SYMTYPE, link="../../x")], "leads out"),
        (
            [entry("a/l", kind=tarfile.SYMTYPE, link=".."), entry("m", kind=tarfile.SYMTYPE, link="a/l/../..")],
            "leads out",
        ),
        ([entry("l", kind=tarfile.SYMTYPE, link="")], "leads out"),
        ([entry("l", kind=tarfile.SYMTYPE, link="d"), entry("l/x", b"x")], "something else as well"),
        ([entry("l", kind=tarfile.SYMTYPE, link="d"), entry("l", kind=tarfile.DIRTYPE)], "something else as well"),
        ([entry("d", kind=tarfile.DIRTYPE), entry("d", kind=tarfile.SYMTYPE, link="x")], "something else as well"),
        ([entry("h", kind=tarfile.LNKTYPE, link="/etc/passwd")], "leads out"),
        ([entry("h", kind=tarfile.LNKTYPE, link="../a.tar.gz")], "leads out"),
        ([entry("h", kind=tarfile.LNKTYPE, link="other")], "not in it"),
        ([entry("l", kind=tarfile.SYMTYPE, link="x"), entry("h", kind=tarfile.LNKTYPE, link="l")], "not in it"),
        ([entry("n", kind=tarfile.CHRTYPE)], "device or pipe"),
        ([entry("n", kind=tarfile.BLKTYPE)], "device or pipe"),
        ([entry("n", kind=tarfile.FIFOTYPE)], "device or pipe"),
        ([entry("x" * 300, b"x")], "File name too long"),
        ([entry("a/" * 120 + "x", b"x")], "too deep"),
        ([entry("x/" + "y" * 2_000_000)], "attributes are too long"),
        ([entry(".", b"x")], "takes the place"),
    ],
)
def test_what_leads_out_or_is_no_file_is_refused(tmp_path: Path, entries: list[Entry], message: str) -> None:
    with pytest.raises(ContextInvalid, match=message) as caught:
        unpacked(tmp_path, *entries)
    assert "\n" not in caught.value.reason
    assert str(tmp_path) not in caught.value.reason
    assert {path.name for path in tmp_path.iterdir()} == {"a.tar.gz", "out"}


def test_more_bytes_than_allowed_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ContextInvalid, match="more than 1000000 bytes"):
        unpacked(tmp_path, entry("zeros", bytes(5_000_000)), max_bytes=1_000_000)
    assert (tmp_path / "out" / "zeros").stat().st_size <= 1_300_000


def test_holes_count_as_what_they_unpack_to(tmp_path: Path) -> None:
    """A GNU sparse file of 100 GiB, of which 512 bytes are in the archive."""
    info = tarfile.TarInfo("sparse")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 512
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\0%011o\0" % (0, 512)
    header[483:495] = b"\x80" + (100 << 30).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    plain = bytes(header) + b"x" * 512 + bytes(1024)
    (tmp_path / "a").write_bytes(compress(plain))
    (tmp_path / "out").mkdir()
    with pytest.raises(ContextInvalid, match="more than 1000000 bytes"):
        unpack(tmp_path / "a", tmp_path / "out", digest_of(plain), 1_000_000, lambda: False)
    assert (tmp_path / "out" / "sparse").stat().st_size <= 1_300_000


def test_more_entries_than_allowed_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builder.unpack.MAX_ENTRIES", 3)
    with pytest.raises(ContextInvalid, match="more than 3 entries"):
        unpacked(tmp_path, *(entry(str(number)) for number in range(4)))


@pytest.mark.parametrize(
    "content",
    [b"", b"text", compress(b"no tar" * 200), compress(tar(entry("a", b"x" * 5000)))[:-40]],
    ids=["empty", "text", "no-tar", "cut"],
)
def test_what_is_no_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "out").mkdir()
    with pytest.raises(ContextInvalid):
        unpack(tmp_path / "a", tmp_path / "out", digest_of(b""), ROOMY, lambda: False)


def test_other_tar_than_announced_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(compress(tar(entry("a"))))
    (tmp_path / "out").mkdir()
    with pytest.raises(ContextInvalid, match="tarDigest is sha256:0"):
        unpack(tmp_path / "a", tmp_path / "out", f"sha256:{'0' * 64}", ROOMY, lambda: False)
    with pytest.raises(ContextInvalid, match="tarDigest is sha256:0"):
        check_tar(tmp_path / "a", f"sha256:{'0' * 64}", ROOMY, lambda: False)


def test_endless_work_can_be_stopped(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(compress(b"") * 50_000)
    asked = iter(range(10**6))
    with pytest.raises(ContextInvalid, match="stopped"):
        check_tar(tmp_path / "a", digest_of(b""), ROOMY, lambda: next(asked) > 3)
    assert next(asked) < 10


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_formats_with_long_names(tmp_path: Path, form: int) -> None:
    plain = tar(entry(f"{'a' * 120}/{'b' * 120}", b"x"), form=form)
    (tmp_path / "a").write_bytes(compress(plain))
    (tmp_path / "out").mkdir()
    unpack(tmp_path / "a", tmp_path / "out", digest_of(plain), ROOMY, lambda: False)
    assert (tmp_path / "out" / ("a" * 120) / ("b" * 120)).read_bytes() == b"x"


# --- filling ---------------------------------------------------------------------------------------------------------


async def test_workspace_has_what_the_build_needs_and_then_is_gone(tmp_path: Path, redis: Redis) -> None:
    context, added = (
        layer_of(tar(entry("src/main.c", b"int main;"), entry("conda.yml", b"old"))),
        image_layer({"a": "b"}),
    )
    layer = Layer(
        location=added.inline()["location"], gzip_digest=added.digest, gzip_size=added.size, tar_digest=added.diff_id
    )
    record = record_of(context=context, conda_file="name: x\n", layers=(layer,))
    async with workspaces_at(tmp_path, redis) as workspaces, workspaces.open(record) as workspace:
        await workspaces.fill(workspace, record)
        assert workspace.folder == tmp_path / "builds" / BUILD_ID
        assert stat.S_IMODE(workspace.folder.stat().st_mode) == 0o700
        assert (workspace.folder / "Containerfile").read_text() == "FROM a\n"
        assert (workspace.context / "src" / "main.c").read_text() == "int main;"
        assert (workspace.context / "conda.yml").read_text() == "name: x\n"
        assert (workspace.context / f"layer-{added.digest[7:]}.tar.gz").read_bytes() == added.content
        assert sorted(path.name for path in workspace.folder.iterdir()) == ["Containerfile", "context"]
    assert list((tmp_path / "builds").iterdir()) == []


async def test_link_of_the_context_is_not_written_through(tmp_path: Path, redis: Redis) -> None:
    context = layer_of(tar(entry("target", b"keep"), entry("conda.yml", kind=tarfile.SYMTYPE, link="target")))
    record = record_of(context=context, conda_file="name: x\n")
    async with workspaces_at(tmp_path, redis) as workspaces, workspaces.open(record) as workspace:
        await workspaces.fill(workspace, record)
        assert (workspace.context / "target").read_bytes() == b"keep"
        assert not (workspace.context / "conda.yml").is_symlink()
    taken = record_of(context=layer_of(tar(entry("conda.yml/x"))), conda_file="name: x\n")
    async with workspaces_at(tmp_path, redis) as workspaces, workspaces.open(taken) as workspace:
        with pytest.raises(BuildFailed, match=r"a folder in the place of conda\.yml"):
            await workspaces.fill(workspace, taken)


async def test_context_comes_from_the_state_store(tmp_path: Path, redis: Redis) -> None:
    layer = layer_of(tar(entry("a", b"kept")))
    store = TokenStore(redis)
    (kept,), contents = await store.take_out((layer,))
    await store.keep(contents, 60)
    assert kept.location == "data:"
    async with workspaces_at(tmp_path, redis) as workspaces, workspaces.open(record_of()) as workspace:
        await workspaces.fill(workspace, record_of(context=kept))
        assert (workspace.context / "a").read_bytes() == b"kept"
    gone = replace(kept, gzip_digest=f"sha256:{'0' * 64}")
    async with workspaces_at(tmp_path, redis) as workspaces, workspaces.open(record_of()) as workspace:
        with pytest.raises(BuildFailed, match="send the request again"):
            await workspaces.fill(workspace, record_of(context=gone))


@pytest.mark.parametrize("form", ["docker", "http"])
async def test_context_comes_from_afar_though_the_connection_breaks(
    tmp_path: Path, redis: Redis, upstream: Callable[..., Upstream], form: str
) -> None:
    plain = tar(entry("a", os.urandom(200_000)))
    server = upstream()
    server.add_blob("lib/ctx", blob(compress(plain)))
    server.faults.truncate_at = 50_000
    path = f"/v2/lib/ctx/blobs/{digest_of(compress(plain))}"
    layer = layer_of(plain, f"docker://{server.address}{path}" if form == "docker" else server.url + path)
    async with workspaces_at(tmp_path, redis, server) as workspaces, workspaces.open(record_of()) as workspace:
        await workspaces.fill(workspace, record_of(context=layer))
        assert (workspace.context / "a").stat().st_size == 200_000
    assert len(server.log) == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gzip_size": 10}, "gzipSize"),
        ({"gzip_size": 10_000}, "gzipSize|ended after"),
        ({"gzip_digest": f"sha256:{'0' * 64}"}, "gzipDigest is sha256:0"),
        ({"tar_digest": f"sha256:{'0' * 64}"}, "tarDigest is sha256:0"),
    ],
)
async def test_context_that_is_another_one_is_refused(
    tmp_path: Path, redis: Redis, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, str | int], message: str
) -> None:
    monkeypatch.setattr("builder.workspace._FIRST_PAUSE_S", 0.001)
    plain = tar(entry("a", b"x"))
    async with scripted(http_answer(body=compress(plain))) as server:
        address = f"127.0.0.1:{server.port}"
        layer = layer_of(plain, f"http://{address}/ctx.tar.gz", **wrong)
        await _refused(tmp_path, redis, address, layer, message)


async def _refused(tmp_path: Path, redis: Redis, address: str, layer: Layer, message: str) -> None:
    class At:
        """What registry_at() wants to know of an upstream."""

    At.address = address  # type: ignore[attr-defined]
    async with workspaces_at(tmp_path, redis, At()) as workspaces, workspaces.open(record_of()) as workspace:  # type: ignore[arg-type]
        with pytest.raises(BuildFailed, match=message):
            await workspaces.fill(workspace, record_of(context=layer))
    assert list((tmp_path / "builds").iterdir()) == []


async def test_private_address_is_refused(tmp_path: Path, redis: Redis, upstream: Callable[..., Upstream]) -> None:
    server = upstream()
    layer = layer_of(tar(entry("a")), f"{server.url}/ctx")
    async with workspaces_at(tmp_path, redis) as workspaces, workspaces.open(record_of()) as workspace:
        with pytest.raises(BuildFailed, match="private or loopback address"):
            await workspaces.fill(workspace, record_of(context=layer))
    assert server.log == []


# --- the folder's life -----------------------------------------------------------------------------------------------


def test_logins_are_for_nobody_else(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    assert workspace.write_logins({}) is None
    file = workspace.write_logins({"r.io": Login("u", "p")})
    assert file is not None
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert json.loads(file.read_text()) == {"auths": {"r.io": {"auth": b64encode(b"u:p").decode()}}}


async def test_folder_goes_when_the_build_is_cancelled(tmp_path: Path, redis: Redis) -> None:
    entered = asyncio.Event()

    async def build(workspaces: Workspaces) -> None:
        async with workspaces.open(record_of()) as workspace:
            (workspace.folder / "x").write_text("x")
            entered.set()
            await asyncio.Event().wait()

    async with workspaces_at(tmp_path, redis) as workspaces:
        task = asyncio.create_task(build(workspaces))
        await entered.wait()
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()  # once more, in the middle of the removal
        with pytest.raises(asyncio.CancelledError):
            await task
    assert list((tmp_path / "builds").iterdir()) == []


@pytest.fixture
def awkward(tmp_path: Path) -> Path:
    """A folder that is hard to remove: of other users, very deep, with a link that leads out."""
    folder = tmp_path / "builds" / BUILD_ID
    (folder / "of-somebody").mkdir(parents=True)
    (folder / "of-somebody" / "file").write_text("x")
    (folder / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "kept").write_text("x")
    here = os.open(folder, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("deep", dir_fd=here)
        deeper = os.open("deep", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = deeper
    os.close(here)
    if os.geteuid() == 0:
        os.chown(folder / "of-somebody", 100_000, 100_000)
    os.chmod(folder / "of-somebody", 0)
    return folder


async def test_awkward_folder_is_removed(tmp_path: Path, awkward: Path) -> None:
    await remove(awkward)
    assert not awkward.exists()
    assert (tmp_path / "outside" / "kept").exists()


async def test_folder_is_removed_where_path_leads_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "left"
    (folder / "deep").mkdir(parents=True)
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    await remove(folder)
    assert not folder.exists()


async def test_leftovers_of_the_killed_are_removed_and_not_those_of_the_living(
    tmp_path: Path, redis: Redis, awkward: Path
) -> None:
    living = tmp_path / "builds" / f"bd-{'1' * 16}_1"
    living.mkdir()
    held = os.open(living, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    async with workspaces_at(tmp_path, redis) as workspaces:
        async with workspaces.open(replace(record_of(), attempt=2)) as own:
            await workspaces.remove_leftovers()
            assert own.folder.exists()
        assert not awkward.exists()
        assert living.exists()
        os.close(held)
        await workspaces.remove_leftovers()
    assert list((tmp_path / "builds").iterdir()) == []


async def test_name_that_is_no_build_is_refused(tmp_path: Path, redis: Redis) -> None:
    async with workspaces_at(tmp_path, redis) as workspaces:
        with pytest.raises(BuildFailed):
            async with workspaces.open(replace(record_of(), build_id="../../x")):
                pass

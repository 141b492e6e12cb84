"""What is kept in the data folder is for the user that the program runs as, and for no other."""

import gzip
import io
import os
import stat
import subprocess
import tarfile
from base64 import b64encode
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from bench.images import image, layer
from bench.upstream import Upstream
from tests.building.works import why_no_builds
from tests.servers import WaveProxy, push

NOBODY = 65534
CONFIG = '[local]\nanonymous_push = true\n[build]\nengine = "none"\n'
TOOL = image([layer({"secret": "the eagle flies at midnight"})])
MINE = image([layer({"secret": "the owl stays"})])
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that every user can look into."""
    with TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def read_by_nobody(folder: Path) -> list[str]:
    """The files in it with content that another user can read."""
    command = ["find", str(folder), "-type", "f", "-size", "+0", "-readable"]
    found = subprocess.run(
        command, user=NOBODY, group=NOBODY, extra_groups=[], check=False, capture_output=True, text=True
    )
    return found.stdout.split()


def fill(proxy: WaveProxy, upstream: Upstream) -> None:
    proxy.pull(f"{proxy.address}/{upstream.address}/tool:1")
    push(proxy.address, "local/mine", MINE, "1")


@needs_root
def test_nobody_else_reads_a_new_data_folder(upstream: Callable[..., Upstream], place: Path) -> None:
    server = upstream()
    server.add("tool", TOOL, "1")
    with WaveProxy(place / "data", upstreams=[server.address], config=CONFIG) as proxy:
        fill(proxy, server)
        assert stat.S_IMODE((place / "data").stat().st_mode) == 0o700
        os.chmod(place / "data", 0o755)  # as one that was there before
        assert read_by_nobody(place / "data") == []
        open_ones = [path.name for path in (place / "data").iterdir() if path.stat().st_mode & 0o077]
        assert open_ones == []


@needs_root
def test_nobody_else_reads_what_an_earlier_version_has_left(upstream: Callable[..., Upstream], place: Path) -> None:
    server = upstream()
    server.add("tool", TOOL, "1")
    proxy = WaveProxy(place / "data", upstreams=[server.address], config=CONFIG)
    with proxy:
        fill(proxy, server)
    subprocess.run(["chmod", "-R", "a+rX", str(place / "data")], check=True)
    subprocess.run(["chmod", "700", str(place / "data" / "redis")], check=True)
    assert len(read_by_nobody(place / "data")) > 4
    with proxy:
        assert read_by_nobody(place / "data") == []
        fill(proxy, server)
        assert stat.S_IMODE((place / "data").stat().st_mode) == 0o755  # others may have files in it


@pytest.mark.skipif(bool(why_no_builds()), reason=why_no_builds())
def test_built_files_are_as_they_would_be_anywhere(wave: Callable[..., WaveProxy]) -> None:
    before = os.umask(0o077)  # as systemd's UMask= may have it
    try:
        proxy = wave()
    finally:
        os.umask(before)
    context = io.BytesIO()
    with tarfile.open(fileobj=context, mode="w") as tar:
        member = tarfile.TarInfo("folder/inner/file")  # the folders are not in it
        member.mode, member.size = 0o644, 2
        tar.addfile(member, io.BytesIO(b"x\n"))
    packed = gzip.compress(context.getvalue(), mtime=0)
    answer = proxy.submit(
        containerFile=b64encode(b"FROM scratch\nCOPY folder /made\n").decode(),
        buildContext={
            "location": f"data:{b64encode(packed).decode()}",
            "gzipDigest": f"sha256:{sha256(packed).hexdigest()}",
            "gzipSize": len(packed),
            "tarDigest": f"sha256:{sha256(context.getvalue()).hexdigest()}",
        },
    )
    modes: dict[str, str] = {}
    for content in proxy.pull(answer["targetImage"]).layers:  # held until it is built
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            modes |= {member.name.rstrip("/"): oct(stat.S_IMODE(member.mode)) for member in tar}
    assert modes == {"made": "0o755", "made/inner": "0o755", "made/inner/file": "0o644"}

"""A builder that is killed in the middle of whatever it does: no build is lost, and nothing is left behind."""

import asyncio
import json
import signal
import sys
from asyncio.subprocess import DEVNULL, Process, create_subprocess_exec
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from gzip import compress
from pathlib import Path
from shutil import which

import pytest

from bench.images import blob, busybox_image, digest_of, has_busybox
from bench.upstream import Upstream
from tests.builds_state import run_out
from tests.patience import PATIENCE_S, eventually, patience
from tests.pushing import Target, target
from tests.servers import ROOT, WaveProxy
from wave_proxy.image.build import BuildRecord, BuildSpec
from wave_proxy.image.request import Layer
from wave_proxy.state.builds import BuildLimits, BuildStore
from wave_proxy.state.redis import connect

LEASE_S = 30.0  # no machine is so slow that it ends while its builder lives
EMPTY_TAR = bytes(10240)

pytestmark = pytest.mark.skipif(
    which("buildah") is None or not has_busybox(), reason="buildah or busybox-static is not installed"
)


@dataclass
class Scene:
    """What builders work with."""

    told: dict[str, object]
    data: Path
    builds: BuildStore
    base: Upstream
    to: Target

    async def submit(self, text: str, context: Layer | None = None) -> str:
        async def admit() -> None:
            """No quota."""

        spec = BuildSpec(
            "0" * 16,
            f"{self.to.address}/lib/tool:1",
            f"FROM {self.base.address}/base/busybox:1\n{text}",
            context=context,
        )
        return (await self.builds.submit(spec, admit))[0].build_id

    async def start(self) -> Process:
        command = [sys.executable, "-m", "tests.builder_process", json.dumps(self.told)]
        return await create_subprocess_exec(*command, cwd=ROOT, stdin=DEVNULL, stdout=DEVNULL)

    @asynccontextmanager
    async def builder(self) -> AsyncIterator[Process]:
        """One that is killed with the block at the latest; what it had claimed is then for others."""
        process = await self.start()
        try:
            yield process
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGKILL)
            await process.wait()
            await run_out(str(self.told["redis"]))

    async def logged(self, build_id: str, text: str, times: int = 1) -> None:
        """Return when the log says that, so many times."""
        async with patience():
            while (await self.builds.read_log(build_id) or b"").decode().count(text) < times:
                await asyncio.sleep(0.02)

    async def done(self, build_id: str) -> BuildRecord:
        record = await self.builds.wait_done(build_id, PATIENCE_S)
        assert record is not None
        assert record.phase == "done"
        return record

    async def all_gone(self) -> None:
        """Return when no process of a box is left."""
        await eventually(lambda: not self.processes(), lambda: str(self.processes()))

    def processes(self) -> list[str]:
        """The command lines of what runs in boxes."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if str(self.data) in (folder / "mountinfo").read_text():
                    found.append((folder / "cmdline").read_text())
            except OSError:
                continue  # it has just ended
        return found


@pytest.fixture
async def scene(
    tmp_path: Path, redis_url: str, upstream: Callable[..., Upstream], wave: Callable[..., WaveProxy]
) -> AsyncIterator[Scene]:
    base = upstream()
    base.add("base/busybox", busybox_image(), "1")
    proxy = wave(redis=redis_url, upstreams=[base.address], config='[build]\nengine = "none"')
    data = tmp_path / "builds"
    async with connect(redis_url) as redis, target() as to:
        told: dict[str, object] = {"redis": redis_url, "data": str(data), "proxy": proxy.url, "lease_s": LEASE_S}
        told["open"] = [base.address, to.address]
        yield Scene(told, data, BuildStore(redis, BuildLimits(4), lease_s=LEASE_S), base, to)
        assert await BuildStore(redis, BuildLimits(4)).queue_length() == (0, 0)
        assert list(data.iterdir()) == []


async def test_killed_while_it_fetches(scene: Scene) -> None:
    packed = compress(EMPTY_TAR)
    scene.base.add_blob("lib/context", blob(packed))
    scene.base.faults.only, scene.base.faults.stall_at = "lib/context", 0
    location = f"docker://{scene.base.address}/v2/lib/context/blobs/{digest_of(packed)}"
    context = Layer(location, digest_of(packed), len(packed), digest_of(EMPTY_TAR))
    async with scene.builder() as first:
        build_id = await scene.submit("RUN true\n", context)
        await eventually(lambda: scene.base.fetches(digest_of(packed)))
        first.send_signal(signal.SIGKILL)
        await first.wait()
        assert [folder.name for folder in scene.data.iterdir()] == [build_id]
    scene.base.faults.release.set()
    async with scene.builder():
        record = await scene.done(build_id)
    assert (record.exit_status, record.attempt) == (0, 2)
    assert ("lib/tool", "1") in scene.to.manifests


async def test_killed_while_it_pushes(scene: Scene) -> None:
    scene.to.held = asyncio.Event()
    async with scene.builder() as first:
        build_id = await scene.submit("RUN true\n")
        await scene.logged(build_id, "is being sent")
        first.send_signal(signal.SIGKILL)
        await first.wait()
    assert scene.to.manifests == {}
    scene.to.held.set()
    async with scene.builder():
        record = await scene.done(build_id)
    assert (record.exit_status, record.attempt) == (0, 2)
    assert ("lib/tool", "1") in scene.to.manifests


async def test_killed_while_it_builds_three_times(scene: Scene) -> None:
    build_id = await scene.submit("RUN echo it be''gins; sleep 1000\n")
    for attempt in (1, 2, 3):
        async with scene.builder() as builder:
            await scene.logged(build_id, "it begins\n", attempt)
            await eventually(lambda: any("sleep" in line for line in scene.processes()))
            builder.send_signal(signal.SIGKILL)
            await builder.wait()
        await scene.all_gone()
    async with scene.builder():
        record = await scene.done(build_id)
        await eventually(lambda: not list(scene.data.iterdir()))
    assert record.exit_status != 0
    assert "died 3 times" in record.reason
    assert scene.to.manifests == {}

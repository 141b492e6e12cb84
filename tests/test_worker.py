"""The builder's life over a real Redis: builds that succeed, fail, are cancelled, given back and taken over."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from shutil import which
from typing import Any, cast

import pytest

from bench.images import Image, busybox_image, has_busybox, image, index, layer
from builder.engines import Engine, Job
from builder.engines.buildah import Buildah
from builder.engines.missing import MissingEngine
from builder.failures import BuildFailed, classify
from builder.gate import Gate
from builder.lending import Lending
from builder.limits import Limits
from builder.pipeline import Pipeline
from builder.work import Work, Works
from builder.worker import Worker
from builder.workspace import Workspaces
from tests.patience import PATIENCE_S, eventually, patience
from tests.pushing import Target, target, write_layout
from tests.redis_faults import durable_redis
from tests.servers import WaveProxy, distribution, has_distribution, push
from wave_proxy.image.build import LOCK_END, LOCK_START, BuildRecord, BuildSpec, Kind
from wave_proxy.image.request import ContainerRequest, Layer
from wave_proxy.state.builds import BuildLimits, BuildStore
from wave_proxy.state.redis import Redis, connect
from wave_proxy.state.tokens import TokenStore
from wave_proxy.upstream.credentials import Credentials
from wave_proxy.upstream.egress import Egress, endpoint_for
from wave_proxy.upstream.registry import Registry

IMAGE = image([layer({"a": "b"})])
LEASE_S = 30.0  # no machine is so slow that it ends while its builder lives...
RENEWED_S = 0.5  # ...which is told of a cancellation when it renews it
STREAM = "wave:{builds}:ready"

Play = Callable[[Job], Awaitable[None]]


async def nothing(_: Job) -> None:
    """A build that is done at once."""


async def forever(_: Job) -> None:
    """A build that never is."""
    await asyncio.Event().wait()


@dataclass
class Script:
    """An engine that does what it is told, and then gives an image. ``jobs`` are those that it began."""

    play: Play = nothing
    result: Image = IMAGE
    registry: str = "127.0.0.1:1"
    jobs: list[Job] = field(default_factory=list)
    ended: int = 0  # jobs that were ended before they were through
    now: int = 0
    most: int = 0  # at the same time

    async def check(self) -> None:
        """It always runs."""

    async def build(self, job: Job) -> Path:
        self.jobs.append(job)
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await self.play(job)
        except asyncio.CancelledError:
            self.ended += 1
            raise
        finally:
            self.now -= 1
        return write_layout(job.folder / "layout", self.result)


@dataclass
class Scene:
    """A state store, a registry to push to, and builders."""

    data: Path
    redis: Redis
    to: Target
    builds: BuildStore

    def spec(self, number: int = 0, **changes: Any) -> BuildSpec:
        members = {"container_file": "FROM scratch\n", "ip_address": "10.0.0.1", **changes}
        return BuildSpec(f"{number:016x}", f"{self.to.address}/lib/tool:{number}", **members)

    async def submit(self, number: int = 0, **changes: Any) -> str:
        async def admit() -> None:
            """No quota."""

        record, _ = await self.builds.submit(self.spec(number, **changes), admit)
        return record.build_id

    async def done(self, build_id: str) -> tuple[BuildRecord, str]:
        """The record of a build when it is done, and its log."""
        record = await self.builds.wait_done(build_id, PATIENCE_S)
        assert record is not None
        assert record.phase == "done"
        return record, (await self.builds.read_log(build_id) or b"").decode()

    async def run_out(self) -> None:
        """All leases run out, as if their builders had died."""
        pending = await self.redis.xpending_range(STREAM, "builders", "-", "+", 100)
        for lease in cast(list[dict[str, bytes]], pending):
            entry, consumer = lease["message_id"], lease["consumer"]
            await self.redis.xclaim(STREAM, "builders", consumer, 0, [entry], idle=60_000, justid=True)

    @asynccontextmanager
    async def builder(
        self,
        engine: Engine | None,
        name: str = "one",
        slots: int = 4,
        authority: str = "wave.test",
        lease_s: float = 3 * RENEWED_S,
    ) -> AsyncIterator[asyncio.Event]:
        """A builder that works until the end of the block, or until the event is set; it builds if it has an engine."""
        stop = asyncio.Event()
        egress = Egress({self.to.address: endpoint_for(self.to.address, insecure=True, allow_private=True)})
        registry, tokens = Registry(egress, Credentials({})), TokenStore(self.redis)
        workspaces = Workspaces(self.data, registry, tokens, 1 << 30)
        works: dict[Kind, Work] = {}
        if engine is not None:
            works["build"] = Pipeline(engine, workspaces, registry, Lending(tokens, authority), Credentials({}))
        worker = Worker(self.builds, Works(works), name, slots=slots, lease_s=lease_s)
        running = asyncio.create_task(worker.run(stop, PATIENCE_S))
        try:
            yield stop
        finally:
            stop.set()
            await running
            await registry.close()
            await egress.close()

    def leftovers(self) -> list[Path]:
        return list(self.data.iterdir()) if self.data.exists() else []


@asynccontextmanager
async def scene_at(tmp_path: Path, url: str, lease_s: float = LEASE_S) -> AsyncIterator[Scene]:
    async with connect(url) as redis, target() as to:
        builds = BuildStore(redis, BuildLimits(4), lease_s=lease_s)
        yield Scene(tmp_path / "builds", redis, to, builds)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builders notice at once that they are to stop."""
    monkeypatch.setattr("builder.worker._BLOCK_S", 0.05)


@pytest.fixture
async def scene(tmp_path: Path, redis_url: str) -> AsyncIterator[Scene]:
    async with scene_at(tmp_path, redis_url) as made:
        yield made
        assert made.leftovers() == []


def inline(content: Any) -> Layer:
    """A layer that a request carries."""
    return Layer(content.inline()["location"], content.digest, content.size, content.diff_id)


async def begun(engine: Script, count: int = 1) -> None:
    """Return when so many jobs have begun."""
    await eventually(lambda: len(engine.jobs) >= count)


async def test_build_is_pushed_and_its_log_kept(scene: Scene) -> None:
    seen: list[str] = []

    async def play(job: Job) -> None:
        job.log(b"STEP 1\n\x1b[31mred\x1b[0m\n")
        job.log(f"{LOCK_START}\nname=1\n{LOCK_END}\n".encode())
        seen.append((job.folder / "context" / "conda.yml").read_text())

    async with scene.builder(Script(play)):
        build_id = await scene.submit(conda_file="name: x\n", template="conda/micromamba:v1")
        record, log = await scene.done(build_id)
    assert (record.exit_status, record.digest, record.reason) == (0, IMAGE.digest, "")
    assert scene.to.manifests["lib/tool", "0"] == IMAGE.manifest
    assert seen == ["name: x\n"]
    assert await scene.builds.read_lock(build_id) == b"name=1\n"
    lines = log.splitlines()
    assert lines[0] == f">> build {build_id} of conda/micromamba:v1 for linux/amd64, attempt 1"
    assert lines[1] == f">> image {scene.to.address}/lib/tool:0"
    assert lines[2:4] == ["STEP 1", "red"]
    assert lines[-1] == f">> pushed {scene.to.address}/lib/tool:0@{IMAGE.digest}"


async def test_log_is_there_while_it_runs(scene: Scene) -> None:
    go_on = asyncio.Event()

    async def play(job: Job) -> None:
        job.log(b"first\n")
        await go_on.wait()

    async with scene.builder(Script(play)):
        build_id = await scene.submit()
        text = b""
        async for piece in scene.builds.follow_log(build_id):
            text += piece
            if b"first\n" in text:
                go_on.set()
    assert text == await scene.builds.read_log(build_id)


async def test_base_images_get_a_token_that_ends_with_the_build(scene: Scene) -> None:
    found: list[ContainerRequest | None] = []
    locations: dict[str, str] = {}

    async def play(job: Job) -> None:
        locations.update(job.base_images)
        for location in locations.values():
            record = await TokenStore(scene.redis).find_record(location.split("/")[2])
            found.append(record.request if record else None)
            job.log(f"Trying to pull {location}:1\n".encode())

    text = "FROM alpine:3\nFROM alpine:4\nCOPY --from=quay.io/x/y:1 /a /\nCOPY --from=wave.test/wt/00/library/z /b /\n"
    async with scene.builder(Script(play)):
        _, log = await scene.done(await scene.submit(container_file=text))
    assert set(locations) == {"docker.io/library/alpine", "quay.io/x/y", "wave.test/wt/00/library/z"}
    assert locations["wave.test/wt/00/library/z"] == "127.0.0.1:1/wt/00/library/z"
    first = found[0]
    assert first is not None
    assert (first.image, first.uncounted, first.platforms) == ("docker.io/library/alpine:3", True, ())
    token = locations["quay.io/x/y"].split("/")[2]
    assert locations["quay.io/x/y"] == f"127.0.0.1:1/wt/{token}/x/y"
    assert token not in log
    assert "Trying to pull quay.io/x/y:1\n" in log
    assert [key async for key in scene.redis.scan_iter("wave:token:*")] == []


async def test_the_reason_names_base_images_as_the_log_does(scene: Scene) -> None:
    lent: list[str] = []

    async def fail(job: Job) -> None:
        lent.extend(job.base_images.values())
        said = f"initializing source docker://quay.io/x/y:1: reading manifest 1 in {lent[-1]}: manifest unknown: no"
        job.log(f"{said}\n".encode())
        raise BuildFailed(classify(job.named(said), 125) if job.spec.container_id[-1] == "1" else said, 125)

    async with scene.builder(Script(fail)):
        for number in range(2):
            record, log = await scene.done(await scene.submit(number, container_file="FROM quay.io/x/y:1\n"))
            assert lent[-1].partition("/")[2].startswith("wt/")
            assert "wt/" not in record.reason + log
            assert "quay.io/x/y: manifest unknown: no" in record.reason


async def test_failures_are_named(scene: Scene) -> None:
    async def fail(_: Job) -> None:
        raise BuildFailed("out of memory: the build used its limit of 4.0 GB", 137)

    async with scene.builder(Script(fail)):
        record, log = await scene.done(await scene.submit())
    assert (record.exit_status, record.digest) == (137, "")
    assert record.reason == "out of memory: the build used its limit of 4.0 GB"
    assert log.splitlines()[-1] == ">> failed: out of memory: the build used its limit of 4.0 GB"
    assert scene.to.manifests == {}


@pytest.mark.parametrize(
    ("engine", "changes", "reason"),
    [
        (Script(forever), {"timeout_s": 0.3}, "timed out: the build took longer than its limit of 0.3 s"),
        (Script(), {"format": "sif"}, "Singularity images are not built by this version yet"),
        (Script(), {"platform": "linux/arm64"}, "missing platform: the built image is for linux/amd64"),
        (Script(result=index([IMAGE])), {}, "the build made an index"),
        (Script(), {"container_file": "RUN x"}, "the container file can't be built: .* no FROM"),
        (Script(), {"container_file": "FROM A:b:c"}, "the container file can't be built: Invalid container image name"),
        (Script(), {"context": Layer("ftp://x", f"sha256:{'0' * 64}", 1, "")}, "a layer's location must be"),
        (MissingEngine("install the package buildah"), {}, "the builder can't run builds: install the package buildah"),
    ],
)
async def test_reasons(scene: Scene, engine: Engine, changes: dict[str, Any], reason: str) -> None:
    async with scene.builder(engine):
        record, log = await scene.done(await scene.submit(**changes))
    assert record.exit_status
    assert re.match(reason, record.reason)
    assert log.splitlines()[-1] == f">> failed: {record.reason}"
    assert scene.to.manifests == {}


async def test_registry_that_refuses_is_named(scene: Scene) -> None:
    scene.to.statuses.append(("POST uploads", 403, {}))
    async with scene.builder(Script()):
        record, _ = await scene.done(await scene.submit())
    assert "the image can't be pushed: " in record.reason
    assert "does not let us push to repository 'lib/tool'" in record.reason


async def test_our_own_registry_that_refuses_needs_the_secret(scene: Scene) -> None:
    scene.to.statuses.append(("POST uploads", 401, {}))
    async with scene.builder(Script(), authority=scene.to.address):
        record, _ = await scene.done(await scene.submit())
    assert "[build] secret must be set, to the same text for the proxy and for the builder" in record.reason
    assert "[registries" not in record.reason


async def test_fault_of_the_builder_ends_the_build_and_not_the_builder(scene: Scene) -> None:
    async def fail(job: Job) -> None:
        if job.spec.container_id.endswith("0"):
            raise ZeroDivisionError

    async with scene.builder(Script(fail)):
        record, _ = await scene.done(await scene.submit(0))
        assert "a fault of the builder (ZeroDivisionError)" in record.reason
        record, _ = await scene.done(await scene.submit(1))
        assert record.succeeded


async def test_no_more_at_a_time_than_there_are_slots(scene: Scene) -> None:
    async def play(_: Job) -> None:
        await eventually(lambda: engine.most == 2)
        await asyncio.sleep(0.1)  # for a third one

    engine = Script(play)
    async with scene.builder(engine, slots=2):
        ids = [await scene.submit(number) for number in range(6)]
        assert all([(await scene.done(build_id))[0].succeeded for build_id in ids])
    assert engine.most == 2


async def test_a_builder_that_does_not_build_leaves_builds_to_others(scene: Scene) -> None:
    async with scene.builder(None, "without an engine"):
        build_id = await scene.submit()
        async with patience():
            while await scene.redis.hget(f"wave:{{builds}}:build:{build_id}", "claim") != b"released":
                await asyncio.sleep(0.01)
        async with scene.builder(Script(), "with one"):
            record, log = await scene.done(build_id)
    assert (record.succeeded, record.attempt) == (True, 1)
    assert "died" not in log


async def test_cancelled_build_ends(scene: Scene) -> None:
    engine = Script(forever)
    async with scene.builder(engine):
        build_id = await scene.submit()
        await begun(engine)
        assert await scene.builds.cancel(build_id, "cancelled by its user")
        record, log = await scene.done(build_id)
    assert (engine.ended, record.succeeded, record.reason) == (1, False, "cancelled by its user")
    assert log.splitlines()[-1] == ">> failed: cancelled by its user"


async def test_build_of_a_builder_that_stops_begins_at_once_at_another(scene: Scene) -> None:
    first, second = Script(forever), Script()
    async with scene.builder(first, "one") as stop:
        build_id = await scene.submit()
        await begun(first)
        stop.set()
    assert first.ended == 1
    assert scene.leftovers() == []
    claim = await scene.builds.claim("who looks", 0)
    assert claim is not None
    assert claim.record.attempt == 1
    await scene.builds.release(claim)
    async with scene.builder(second, "two"):
        record, log = await scene.done(build_id)
    assert record.succeeded
    assert ">> this builder is stopped, the build begins anew at the next one\n" in log


async def test_build_that_was_taken_over_is_ended_and_left_alone(scene: Scene) -> None:
    engine = Script(forever)
    async with scene.builder(engine, slots=1):  # so that it does not take it over from itself
        build_id = await scene.submit()
        await begun(engine)
        other = None
        while other is None:  # it is renewed in between
            await scene.run_out()
            other = await scene.builds.claim("other", 0.0)
        await eventually(lambda: engine.ended)
        await scene.builds.append_log(other, b"mine\n")
        await scene.builds.finish(other, exit_status=3, reason="mine")
    record, log = await scene.done(build_id)
    assert (record.exit_status, record.reason, record.attempt) == (3, "mine", 2)
    assert log.endswith("mine\n")
    assert scene.to.manifests == {}


async def test_lease_is_held_for_as_long_as_the_build_takes(tmp_path: Path, redis_url: str) -> None:
    go_on = asyncio.Event()

    async def play(_: Job) -> None:
        await go_on.wait()

    engine = Script(play)
    lease_s = 4.0
    async with scene_at(tmp_path, redis_url, lease_s) as scene, scene.builder(engine, lease_s=lease_s):
        build_id = await scene.submit()
        await begun(engine)
        assert await scene.builds.claim("other", 1.5 * lease_s) is None
        go_on.set()
        record, _ = await scene.done(build_id)
    assert (record.attempt, record.succeeded) == (1, True)


async def test_build_goes_on_while_redis_is_away(tmp_path: Path) -> None:
    go_on = asyncio.Event()

    async def play(job: Job) -> None:
        await go_on.wait()
        job.log(b"while it was away\n")

    engine = Script(play)
    async with durable_redis() as redis, scene_at(tmp_path, redis.url) as scene, scene.builder(engine):
        build_id = await scene.submit()
        await begun(engine)
        redis.stop()
        go_on.set()
        await asyncio.sleep(0.15)
        await redis.start()
        record, log = await scene.done(build_id)
        assert (record.attempt, record.exit_status) == (1, 0)
        assert "while it was away\n" in log
        assert len(engine.jobs) == 1


async def test_lock_of_an_earlier_build_is_kept_when_the_step_came_out_of_a_cache(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def play(job: Job) -> None:
        job.log(f"STEP 2: RUN echo '{LOCK_START}'\n".encode())
        if len(engine.jobs) == 1:
            job.log(f"{LOCK_START}\nname=1\n{LOCK_END}\n".encode())

    async def admit() -> None:
        """No quota."""

    engine = Script(play)
    async with scene.builder(engine):
        first = await scene.submit()
        await scene.done(first)
        again, is_new = await scene.builds.submit(scene.spec(), admit, gone=first)
        assert is_new
        await scene.done(again.build_id)
    assert await scene.builds.read_lock(again.build_id) == b"name=1\n"


# --- for real ----------------------------------------------------------------------------------------------------

needs_buildah = pytest.mark.skipif(
    which("buildah") is None or not has_busybox() or not has_distribution(),
    reason="buildah, busybox-static or docker-registry is not installed",
)


@needs_buildah
async def test_real_build_through_wave_proxy(tmp_path: Path, redis_url: str, wave: Callable[..., WaveProxy]) -> None:
    with distribution(tmp_path) as registry_address:
        push(registry_address, "base/busybox", busybox_image(), "1")
        proxy = wave(redis=redis_url, upstreams=[registry_address], config='[build]\nengine = "none"')
        async with scene_at(tmp_path, redis_url) as scene:
            egress = Egress({})
            engine = Buildah(Limits(1 << 30, 500, 1 << 30, 1 << 20), Gate(egress, proxy.url), proxy.url, "wave.test")
            await engine.check()
            async with scene.builder(engine):
                text = (
                    f"FROM {registry_address}/base/busybox:1\nCOPY hello /hello\nRUN cat /hello && echo made > /made\n"
                )
                build_id = await scene.submit(
                    container_file=text,
                    context=inline(layer({"hello": "from the context"})),
                )
                record, log = await scene.done(build_id)
            await egress.close()
        assert record.exit_status == 0, log
        assert "from the context" in log
        assert "/wt/" not in log
        assert proxy.url.removeprefix("http://") not in log
        assert record.digest in log

"""Scans by a builder, from the queue to the kept report, over a registry and a Redis that are real."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest

from bench.images import Image, image, index, layer
from bench.upstream import Upstream
from builder.advisories import Advisories
from builder.child import Allowance
from builder.failures import TIMED_OUT
from builder.fetching import Fetching
from builder.lending import Lending
from builder.scanner import Scanner
from builder.trivy import Trivy
from builder.work import Works
from builder.worker import Worker
from builder.workspace import Workspaces
from tests.patience import PATIENCE_S, eventually
from tests.scanner_program import Program, write_program
from wave_proxy.image.build import BuildRecord, BuildSpec
from wave_proxy.image.oci import digest_of
from wave_proxy.state.builds import BuildLimits, BuildStore
from wave_proxy.state.redis import Redis, connect
from wave_proxy.state.scans import ScanReports
from wave_proxy.state.tokens import TokenStore
from wave_proxy.upstream.credentials import Credentials
from wave_proxy.upstream.egress import Egress, endpoint_for
from wave_proxy.upstream.registry import Registry

AMD64 = image([layer({"a": "amd64"}), layer({"b": "2"})])
ARM64 = image([layer({"a": "arm64"})], platform="linux/arm64")
BOTH = index([ARM64, AMD64])
ONLY_ARM = index([ARM64])
# Checks the layout as the program sees it, and says which image is in it.
LOOK = """
    entry = json.load(open("image/index.json"))["manifests"][0]
    manifest = json.load(open("image/blobs/" + entry["digest"].replace(":", "/")))
    sizes = [os.path.getsize("image/blobs/" + b["digest"].replace(":", "/")) == b["size"] for b in manifest["layers"]]
    print("looked at", entry["digest"], sizes)
    write('{"SchemaVersion": 2, "Results": [{"Vulnerabilities": [{"VulnerabilityID": "CVE-1", "Severity": "HIGH"},'
          '{"VulnerabilityID": "CVE-2", "Severity": "CRITICAL"}, {"VulnerabilityID": "CVE-3", "Severity": "HIGH"}]}]}')
"""


class Scene:
    """A registry in the place of wave-proxy, and a builder that scans what it has."""

    def __init__(self, folder: Path, redis: Redis, upstream: Upstream) -> None:
        self.folder = folder
        self.redis = redis
        self.upstream = upstream
        self.builds = BuildStore(redis, BuildLimits(4), lease_s=30.0)
        self.reports = ScanReports(redis)

    @asynccontextmanager
    async def builder(self, program: Program, max_bytes: int = 1 << 30) -> AsyncIterator[None]:
        """A builder that works until the end of the block."""
        stop, host = asyncio.Event(), self.upstream.address
        egress = Egress({host: endpoint_for(host, insecure=True, allow_private=True)})
        registry, tokens = Registry(egress, Credentials({}), attempts=1), TokenStore(self.redis)
        workspaces = Workspaces(self.folder / "builds", registry, tokens, 1 << 30)
        advisories = Advisories(self.folder / "cache", offline=False)
        trivy = Trivy(str(program.path), advisories, Allowance(1 << 30, 1 << 30, 1 << 20), severities=("HIGH",))
        fetching = Fetching(registry, workspaces, host, max_bytes)
        scanner = Scanner(trivy, fetching, workspaces, Lending(tokens, host), self.reports, most=2)
        worker = Worker(self.builds, Works({"scan": scanner}), "one", slots=4, lease_s=1.5)  # renewed twice a second
        running = asyncio.create_task(worker.run(stop, PATIENCE_S))
        try:
            yield
        finally:
            stop.set()
            await running
            await registry.close()
            await egress.close()

    async def submit(self, reference: str = "1", **changes: Any) -> str:
        async def admit() -> None:
            """No quota."""

        members: dict[str, Any] = {"platform": "", "timeout_s": PATIENCE_S, **changes}
        separator = "@" if reference.startswith("sha256:") else ":"
        source = f"{self.upstream.address}/wt/image{separator}{reference}"
        number = await self.redis.incr("number")
        spec = BuildSpec(f"{number:016x}", "docker.io/library/image", "", kind="scan", source_image=source, **members)
        record, _ = await self.builds.submit(spec, admit)
        return record.build_id

    async def done(self, scan_id: str) -> tuple[BuildRecord, str]:
        record = await self.builds.wait_done(scan_id, PATIENCE_S)
        assert record is not None
        assert record.phase == "done"
        assert list((self.folder / "builds").iterdir()) == []
        return record, (await self.builds.read_log(scan_id) or b"").decode()


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builders notice at once that they are to stop."""
    monkeypatch.setattr("builder.worker._BLOCK_S", 0.05)


@pytest.fixture
async def scene(tmp_path: Path, redis_url: str) -> AsyncIterator[Scene]:
    with Upstream() as upstream:
        for name, made in {"1": AMD64, "both": BOTH, "arm": ONLY_ARM}.items():
            upstream.add("wt/image", made, name)
        async with connect(redis_url) as redis:
            yield Scene(tmp_path, redis, upstream)


def looking(folder: Path) -> Program:
    return write_program(folder / "bin", image=f"os.symlink('docker.io_library_image', 'image'){LOOK}")


async def test_a_scan(scene: Scene, tmp_path: Path) -> None:
    async with scene.builder(looking(tmp_path)):
        scan_id = await scene.submit()
        record, log = await scene.done(scan_id)
    assert (record.exit_status, record.digest, record.reason) == (0, AMD64.digest, "")
    assert await scene.reports.find_counts(scan_id) == {"HIGH": 2, "CRITICAL": 1}
    assert [one.id for one in await scene.reports.find_vulnerabilities(scan_id)] == ["CVE-2", "CVE-1"]
    assert orjson.loads(b"".join(await scene.reports.find_spdx(scan_id) or ()))["spdxVersion"] == "SPDX-2.3"
    assert await scene.redis.ttl(f"wave:scan:{scan_id}") > 600_000
    lines = log.splitlines()
    assert lines[0] == f">> scan {scan_id} of docker.io/library/image, attempt 1"
    assert f"looked at {AMD64.digest} [True, True]" in lines
    assert lines[-1] == ">> vulnerabilities: 1 critical, 2 high"


@pytest.mark.parametrize(
    ("reference", "platform", "expected"),
    [
        ("both", "", AMD64),
        ("both", "linux/arm64", ARM64),
        ("arm", "", ARM64),
        ("1", "linux/arm64", AMD64),
        (BOTH.digest, "linux/amd64", AMD64),
    ],
    ids=["index", "index for a platform", "index without linux/amd64", "an image is what it is", "by digest"],
)
async def test_which_image_it_is(scene: Scene, tmp_path: Path, reference: str, platform: str, expected: Image) -> None:
    async with scene.builder(looking(tmp_path)):
        record, log = await scene.done(await scene.submit(reference, platform=platform))
    assert (record.digest, record.reason) == (expected.digest, "")
    assert f"image {expected.digest}, {'2 layers' if expected is AMD64 else '1 layer'}, " in log


@pytest.mark.parametrize(
    ("reference", "platform", "reason"),
    [
        ("none", "", "the image can't be had: "),
        ("arm", "linux/amd64", "missing platform: the index has no image for linux/amd64"),
        ("chart", "", "what is to be scanned is not a container image, but application/vnd.oci.image.manifest.v1+json"),
    ],
    ids=["not there", "another platform", "no image"],
)
async def test_an_image_that_can_not_be_scanned(
    scene: Scene, tmp_path: Path, reference: str, platform: str, reason: str
) -> None:
    scene.upstream.add("wt/image", _chart(), "chart")
    program = looking(tmp_path)
    async with scene.builder(program):
        record, log = await scene.done(scan_id := await scene.submit(reference, platform=platform))
    assert record.succeeded is False
    assert record.reason.startswith(reason)
    assert log.endswith(f">> failed: {record.reason}\n")
    assert program.calls == []
    assert await scene.reports.find_spdx(scan_id) is None


async def test_an_image_that_is_too_large(scene: Scene, tmp_path: Path) -> None:
    async with scene.builder(looking(tmp_path), max_bytes=100):
        record, _ = await scene.done(await scene.submit())
    assert record.reason.endswith("more than [build] disk allows")


async def test_a_blob_that_is_not_what_it_should_be(scene: Scene, tmp_path: Path) -> None:
    scene.upstream.faults.corrupt_last_byte = True
    async with scene.builder(looking(tmp_path)):
        record, _ = await scene.done(await scene.submit())
    assert record.succeeded is False
    assert "can't be had" in record.reason


async def test_a_program_that_fails(scene: Scene, tmp_path: Path) -> None:
    program = write_program(tmp_path / "bin", image="print('FATAL no good at', os.getcwd(), cache); sys.exit(1)")
    async with scene.builder(program):
        record, log = await scene.done(scan_id := await scene.submit())
    assert (record.exit_status, record.reason) == (
        1,
        "the scanner ended with exit status 1: no good at . [scan] cache",
    )
    assert str(tmp_path) not in log
    assert await scene.reports.find_counts(scan_id) == {}


async def test_a_scan_that_takes_too_long(scene: Scene, tmp_path: Path) -> None:
    program = write_program(tmp_path / "bin", image="time.sleep(600)")
    async with scene.builder(program):
        record, _ = await scene.done(await scene.submit(timeout_s=4.0))
    assert record.exit_status == TIMED_OUT
    assert record.reason.startswith("Container scan timed out")
    assert not Path(f"/proc/{program.calls[-1]['pid']}").exists()


async def test_a_scan_is_cancelled(scene: Scene, tmp_path: Path) -> None:
    program = write_program(tmp_path / "bin", image="time.sleep(600)")
    async with scene.builder(program):
        scan_id = await scene.submit()
        await eventually(lambda: len(program.calls) >= 2)
        await scene.builds.cancel(scan_id, "enough")
        record, _ = await scene.done(scan_id)
    assert record.reason == "enough"


async def test_a_builder_that_stops_leaves_the_scan_to_the_next(scene: Scene, tmp_path: Path) -> None:
    slow = write_program(tmp_path / "slow", image="time.sleep(600)")
    async with scene.builder(slow):
        scan_id = await scene.submit()
        await eventually(lambda: len(slow.calls) >= 2)
    async with scene.builder(looking(tmp_path)):
        record, _ = await scene.done(scan_id)
    assert (record.exit_status, record.attempt) == (0, 1)


def _chart() -> Image:
    """A manifest of something else: its config is none of an image."""
    document = orjson.loads(AMD64.manifest)
    document["config"]["mediaType"] = "application/vnd.cncf.helm.config.v1+json"
    manifest = orjson.dumps(document)
    return Image(digest_of(manifest), AMD64.media_type, manifest, AMD64.blobs)

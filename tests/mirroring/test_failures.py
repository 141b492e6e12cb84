"""Mirrors that fail, wait or are ended, by the whole program: each says why, and leaves nothing running."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from bench.images import Image, image, index, layer, random_blob
from bench.upstream import Upstream
from tests.mirroring.scene import Scene, open_scene
from tests.servers import has_distribution

SOURCES = 7


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Scene, list[Upstream]]]:
    """The program, and registries that misbehave: one for each test, as such a one is left alone for a while."""
    if not has_distribution():
        pytest.skip("docker-registry is not installed (Debian package docker-registry)")
    with ExitStack() as stack:
        sources = [stack.enter_context(Upstream()) for _ in range(SOURCES)]
        known = [source.address for source in sources]
        yield stack.enter_context(open_scene(tmp_path_factory.mktemp("mirror"), "", known)), sources


@pytest.fixture
def scene(opened: tuple[Scene, list[Upstream]]) -> Scene:
    """The program with a registry of its own to mirror from, which has ``lib/tool:1``."""
    scene, sources = opened
    scene.source = sources.pop()
    number = len(sources)
    scene.place = f"{scene.target.address}/failing-{number}"
    scene.prefix = f"failing-{number}/"
    scene.source.add("lib/tool", tool(number), "1")
    return scene


def tool(number: int) -> Image:
    return index([image([layer({"data": random_blob(20_000, number)})])])


def failed(scene: Scene, answer: dict[str, Any]) -> str:
    """Why a mirror failed."""
    found = scene.ended(answer)
    assert found["exitCode"] != 0, found["logs"]
    reason: str = found["reason"]
    assert f">> failed: {reason}\n" in found["logs"]
    assert "wt/" not in found["logs"], "the token of a job is nobody's business"
    assert "wt/" not in reason
    return reason


def test_a_source_that_is_not_whole(scene: Scene) -> None:
    scene.source.faults.status = {"/manifests/sha256:": 404}
    reason = failed(scene, scene.submit("lib/tool:1"))
    assert reason.startswith(f"source not found: image '{scene.source.address}/lib/tool@sha256:")


def test_a_source_that_refuses(scene: Scene) -> None:
    scene.source.faults.status = {"/manifests/sha256:": 403}
    reason = failed(scene, scene.submit("lib/tool:1"))
    assert reason == "source denied: its registry does not let us read it with the login that applies to who asked"


def test_a_blob_that_the_source_lacks(scene: Scene) -> None:
    scene.source.faults.status = {"/blobs/": 404}
    reason = failed(scene, scene.submit("lib/tool:1"))
    assert reason.startswith("source not found: ")
    assert scene.source.address in reason


@pytest.mark.parametrize(
    ("what", "status", "problem"),
    [
        pytest.param("POST", 403, "target denied: registry", id="denied"),
        pytest.param("POST", 404, "target not found: ", id="repository that has to be created first"),
        pytest.param("PUT /v2/{}lib/tool/manifests/", 400, "target can't be written: ", id="manifest refused"),
    ],
)
def test_a_target_that_refuses(opened: tuple[Scene, list[Upstream]], what: str, status: int, problem: str) -> None:
    scene, sources = opened
    scene.source = sources[0]
    scene.place, scene.prefix = f"{scene.target.address}/refusing-{status}", f"refusing-{status}/"
    scene.source.add("lib/tool", tool(status), "1")
    for _ in range(4):  # uploads go on beside each other
        scene.target.refuse(what.format(scene.prefix), status)
    reason = failed(scene, scene.submit("lib/tool:1"))
    scene.target.forget_refusals()
    assert reason.startswith(problem)


def test_a_target_that_is_busy_is_asked_again(scene: Scene) -> None:
    scene.target.refuse("POST", 429, {"Retry-After": "1"})
    scene.target.refuse("PUT", 503)
    found = scene.mirrored("lib/tool:1")
    assert "; trying again in 1.0 s" in found["logs"]


@pytest.mark.skipif(not has_distribution(), reason="docker-registry is not installed (Debian package docker-registry)")
def test_one_that_takes_too_long(tmp_path: Path) -> None:
    with open_scene(tmp_path, '[mirror]\ntimeout = "2s"\n') as scene:
        scene.source.add("lib/tool", tool(0), "1")
        scene.source.faults.stall_at = 100
        reason = failed(scene, scene.submit("lib/tool:1"))
        scene.source.faults.release.set()
    assert reason == (
        "timed out: the mirror took longer than its limit of 2 s; have the operator raise [mirror] timeout"
    )

"""A builder that is killed while it mirrors: the next one goes on, and sends nothing twice that the target had."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.images import Image, image, index, layer, random_blob
from tests.building.works import builder_pids
from tests.mirroring.scene import Scene, open_local_scene, open_scene
from tests.patience import until
from tests.servers import has_distribution

BLOB_BYTES = 6_000_000  # more than the buffers of sockets hold


@pytest.fixture(params=["distribution", "local"])
def scene(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Scene]:
    """Where mirrors go: to another registry, or to a local repository."""
    if request.param == "distribution" and not has_distribution():
        pytest.skip("docker-registry is not installed (Debian package docker-registry)")
    with open_scene(tmp_path) if request.param == "distribution" else open_local_scene(tmp_path) as opened:
        yield opened


def two_platforms(number: int) -> Image:
    """An index of two images that share a layer; each has one of its own."""
    sizes = (1000, BLOB_BYTES, 1000)
    layers = [layer({"data": random_blob(size, 10 * number + part)}) for part, size in enumerate(sizes)]
    amd = image([layers[0], layers[1]])
    return index([amd, image([layers[0], layers[2]], platform="linux/arm64")])


def kill_builder(scene: Scene) -> None:
    """SIGKILL, as when the kernel runs out of memory; the supervisor starts another one."""
    (pid,) = builder_pids(scene.wave)
    os.kill(pid, signal.SIGKILL)


def wait_for_attempt(scene: Scene, answer: dict[str, Any], attempt: int) -> None:
    mirror_id = answer["buildId"]
    until(lambda: f"attempt {attempt}\n" in scene.log(mirror_id), lambda: scene.log(mirror_id))


def check_copied(scene: Scene, made: Image, repository: str, digest: str) -> None:
    """The target has it as it is, and was sent no blob that it had."""
    there = scene.pull(repository, "1")
    assert digest == there.digest == made.digest
    assert {child.digest for child in there.children} == {child.digest for child in made.children}
    assert scene.sent(repository) == {blob.digest: [blob.size] for child in made.children for blob in child.blobs}


def test_a_mirror_survives_the_death_of_three_builders(scene: Scene) -> None:
    made = two_platforms(1)
    scene.source.add("lib/tool", made, "1")
    own = [child.blobs[-1].digest for child in made.children]  # the layer that only one platform has

    # While it fetches: upstream stalls in the middle of a blob of the first platform.
    scene.source.faults.only, scene.source.faults.stall_at = own[0], 1000
    answer = scene.submit("lib/tool:1")
    until(lambda: scene.source.fetches(own[0]), lambda: scene.log(answer["buildId"]))
    until(lambda: len(scene.sent("lib/tool")) == 2, lambda: scene.log(answer["buildId"]))
    uploading = scene.target.hold("blob", f"{scene.prefix}lib/tool")
    kill_builder(scene)

    # While a blob is uploaded: the target takes its first bytes, and then no more.
    scene.source.faults.release.set()
    wait_for_attempt(scene, answer, 2)
    until(uploading.reached.is_set, lambda: scene.log(answer["buildId"]))
    manifest = scene.target.hold("manifest", f"{scene.prefix}lib/tool")
    kill_builder(scene)
    uploading.release.set()

    # Between the blobs and the manifests: the target does not take the first manifest.
    wait_for_attempt(scene, answer, 3)
    until(manifest.reached.is_set, lambda: scene.log(answer["buildId"]))
    assert len(scene.sent("lib/tool")) == 3
    kill_builder(scene)

    # It is given up with the third builder, and begins where that one was when it is asked for again.
    found = scene.ended(answer)
    assert found["exitCode"] == 255
    assert found["reason"] == "the builder died 3 times while mirroring"
    manifest.release.set()
    until(lambda: scene.submit("lib/tool:1")["buildId"] != answer["buildId"], lambda: "no new")
    again = scene.submit("lib/tool:1")
    found = scene.ended(again)
    assert found["exitCode"] == 0, found["logs"]
    check_copied(scene, made, "lib/tool", found["digest"])
    assert all(scene.source.fetches(digest) == 1 for digest in own), "each blob is fetched once"

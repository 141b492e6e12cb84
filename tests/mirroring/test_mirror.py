"""Mirrors by the whole program: an image of another registry copied to a third one, asked for by its users."""

from collections.abc import Iterator

import pytest

from bench.images import Family, Image, image, index, layer
from tests.mirroring.scene import Scene, open_scene
from tests.servers import has_distribution


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    if not has_distribution():
        pytest.skip("docker-registry is not installed (Debian package docker-registry)")
    with open_scene(tmp_path_factory.mktemp("mirror")) as opened:
        yield opened


def two_platforms(name: str, family: Family = "oci") -> Image:
    """An index of two images that share a layer."""
    shared = layer({"shared": name})
    images = [
        image([shared, layer({"own": f"{name} {platform}"})], platform=platform, family=family)
        for platform in ("linux/amd64", "linux/arm64")
    ]
    return index(images, family=family)


@pytest.mark.parametrize("family", ["oci", "docker"])
def test_an_index_is_copied_with_all_its_platforms(scene: Scene, family: Family) -> None:
    made = two_platforms(family, family)
    scene.source.add(f"{family}/tool", made, "1.0")
    found = scene.mirrored(f"{family}/tool:1.0")
    assert found["digest"] == made.digest
    assert found["targetImage"] == f"{scene.place}/{family}/tool:1.0"
    there = scene.pull(f"{family}/tool", "1.0")
    assert (there.digest, there.manifest, there.media_type) == (made.digest, made.manifest, made.media_type)
    assert [child.manifest for child in there.children] == [child.manifest for child in made.children]
    sent = scene.sent(f"{family}/tool")
    sizes = {blob.digest: [blob.size] for child in made.children for blob in child.blobs}
    assert sent == sizes, "each blob once"

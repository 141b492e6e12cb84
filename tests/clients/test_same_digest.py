"""The same request over the same image gives the same bytes, whichever machine answers."""

from collections.abc import Iterator

import pytest

from bench.images import digest_of
from tests.clients.programs import Client, needs
from tests.clients.scene import Case, Scene, Source, every_case
from tests.servers import WaveProxy


@pytest.fixture(scope="module")
def other(sources: tuple[dict[str, Source], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A second program, with a data folder of its own, in front of the same registries."""
    found, config = sources
    with WaveProxy(tmp_path_factory.mktemp("other") / "data", config=config) as wave:
        yield Scene(wave, found)


@every_case
def test_two_data_folders_give_the_same_manifest(scene: Scene, other: Scene, case: Case) -> None:
    # A pull checks the size and the digest of every descriptor.
    here, there = scene.pulled(scene.target(case)), other.pulled(other.target(case))
    assert here == there
    assert (here.digest == scene.source(case).image.digest) is not case.changed
    if here.children:
        expected = scene.source(case).image.children
        assert [child.digest in [old.digest for old in expected] for child in here.children] == [not case.changed] * 2


@needs("crane", "go install github.com/google/go-containerregistry/cmd/crane@v0.20.3")
def test_crane_sees_the_same_digest(scene: Scene, other: Scene) -> None:
    crane, case = Client("crane"), Case("index", True, "tag")
    here, there = (crane("manifest", place.target(case)).encode() for place in (scene, other))
    assert digest_of(here) == digest_of(there) == scene.pulled(scene.target(case)).digest

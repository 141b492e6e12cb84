"""containerd's own client, which fetches as a kubelet's does, on images of every kind."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.programs import Client, containerd_daemon, reason_to_skip_daemon
from tests.clients.scene import Case, Scene, every_case, read_layout, walk

SKIP = reason_to_skip_daemon("containerd", "ctr", "Debian package containerd, which docker.io brings")
pytestmark = pytest.mark.skipif(bool(SKIP), reason=SKIP)

PULL = ("images", "pull", "--snapshotter=native")


@pytest.fixture(scope="module")
def containerd() -> Iterator[tuple[Client, Path]]:
    """ctr with a daemon whose store is empty, and the folder of that store."""
    with containerd_daemon() as started:
        yield started


@every_case
def test_pull(containerd: tuple[Client, Path], scene: Scene, case: Case) -> None:
    ctr, store = containerd
    target = scene.target(case)
    ctr(*PULL, "--plain-http", "--all-platforms", target)  # it unpacks the layers and compares their diff_ids
    pulled = scene.pulled(target)
    (line,) = [line for line in ctr("images", "list").splitlines() if line.startswith(f"{target} ")]
    assert line.split()[1:3] == [pulled.media_type, pulled.digest]
    found = walk(pulled.manifest, lambda digest: read_layout(store, digest))
    assert found <= {f"sha256:{path.name}" for path in (store / "blobs" / "sha256").iterdir()}
    ctr("images", "remove", "--sync", target)  # what comes next fetches again


def test_it_finds_out_that_the_port_is_plain(containerd: tuple[Client, Path], scene: Scene) -> None:
    ctr, store = containerd
    target = scene.target(Case("docker", True, "tag"))
    ctr(*PULL, target)
    assert read_layout(store, scene.pulled(target).digest) == scene.pulled(target).manifest


def test_an_unknown_token(containerd: tuple[Client, Path], scene: Scene) -> None:
    finished = containerd[0].attempt(*PULL, "--plain-http", scene.unknown())
    assert finished.returncode != 0
    assert "not found" in finished.stderr

"""A data folder without room: images still arrive, whole and verified, and nothing half-written stays."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.images import image, layer, random_blob
from bench.upstream import Upstream
from tests.patience import until
from tests.servers import WaveProxy

MEGABYTES = 16


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of 16 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={MEGABYTES}m", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mount.returncode:
        pytest.skip(f"can't mount a small file system here: {mount.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_an_image_larger_than_the_disk_is_pulled_past_the_store(
    upstream: Callable[..., Upstream], wave: Callable[..., WaveProxy], small_disk: Path
) -> None:
    big = layer({"big.bin": random_blob(2 * MEGABYTES << 20, seed=5)}, compression="none")
    original = image([layer({"a": "b"}), big])
    registry = upstream()
    registry.add("lib/big", original, "v1")
    proxy = wave(upstreams=[registry.address], data=small_disk / "data")
    target = proxy.submit(containerImage=f"{registry.address}/lib/big:v1", containerConfig={"env": ["A=1"]})[
        "targetImage"
    ]
    for _ in range(2):
        assert proxy.pull(target).layers[1] == big.content
    until(lambda: not list((small_disk / "data" / "spool").iterdir()))


def test_a_disk_that_is_full_to_the_last_byte_still_serves_and_says_so(
    upstream: Callable[..., Upstream], wave: Callable[..., WaveProxy], small_disk: Path
) -> None:
    original = image([layer({"big.bin": random_blob(1 << 20, seed=6)}, compression="none")])
    registry = upstream()
    registry.add("lib/app", original, "v1")
    proxy = wave(upstreams=[registry.address], data=small_disk / "data")
    inline = layer({"etc/added": "added"})
    asked = {
        "containerImage": f"{registry.address}/lib/app:v1",
        "containerConfig": {"layers": [inline.inline()]},
    }
    target = proxy.submit(**asked)["targetImage"]
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space"), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(65536))
    os.sync()
    assert proxy.pull(target).layers == (original.blobs[1].content, inline.content)
    answers = [proxy.request("POST", "/v1alpha2/container", body=asked) for _ in range(5)]
    assert {answer.status for answer in answers} <= {200, 503}
    assert all("Redis" in answer.json()["message"] for answer in answers if answer.status == 503)
    filler.unlink()
    # Redis looks at the disk once a second.
    until(lambda: proxy.request("POST", "/v1alpha2/container", body=asked).status == 200, "it does not recover")
    assert proxy.pull(proxy.submit(**asked)["targetImage"]).layers[1] == inline.content

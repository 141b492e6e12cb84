"""A cluster that starts at once: 200 clients, one cold image, two workers."""

import re
from collections.abc import Callable
from pathlib import Path

from bench.herd import Herd
from bench.images import image, layer, random_blob
from bench.upstream import Upstream
from tests.servers import WaveProxy

CLIENTS = 200
MEGABYTES = 256
RESIDENT_LIMIT = 200 << 20


def peak_resident(pid: int) -> int:
    """The most memory that the process ever had resident, in bytes."""
    match = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def test_200_clients_pull_one_cold_image_over_two_workers(
    upstream: Callable[..., Upstream], wave: Callable[..., WaveProxy]
) -> None:
    big = layer({"big.bin": random_blob(MEGABYTES << 20, seed=1)}, compression="none")
    original = image([layer({"etc/small": "small"}), big], env=("A=1",))
    registry = upstream()
    registry.add("lib/big", original, "v1")
    proxy = wave(upstreams=[registry.address], workers=2)
    inline = layer({"etc/added": "added"})
    target = proxy.submit(
        containerImage=f"{registry.address}/lib/big:v1", containerConfig={"env": ["B=2"], "layers": [inline.inline()]}
    )["targetImage"]
    # localhost may be ::1 for the client and the test's server listens on IPv4
    target = f"{proxy.address}/{target.split('/', 1)[1]}"
    with Herd(1) as herd:
        pulls = herd.pull(target, CLIENTS)
    assert {pull.error for pull in pulls} == {""}
    assert {pull.verified for pull in pulls} == {5}  # manifest, config, three layers: bytes and sizes were right
    assert len({pull.digest for pull in pulls}) == 1
    fetches = {blob.digest: registry.fetches(blob.digest) for blob in original.blobs}
    assert set(fetches.values()) == {1}, fetches
    assert max(peak_resident(pid) for pid in proxy.workers()) < RESIDENT_LIMIT

"""For which architecture a pull counts: what was asked for, else what an index or a config has said of the manifest."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from bench.images import image, index, layer
from bench.upstream import Upstream
from tests.pulling import Port, port
from wave_proxy.cache.manifests import StoredManifest
from wave_proxy.image.request import ContainerConfig
from wave_proxy.serve import architectures
from wave_proxy.serve.architectures import Architectures

Start = Callable[..., Upstream]

AMD = image([layer({"amd": "1"})])
ARM = image([layer({"arm": "1"})], platform="linux/arm64/v8")
RISC = image([layer({"risc": "1"})], platform="linux/riscv64")
MULTI = index([AMD, ARM, RISC])
CONFIG = ContainerConfig(env=("A=1",))


def serving(start: Start) -> Upstream:
    server = start()
    server.add("tool", MULTI, "all")
    server.add("tool", ARM, "arm")
    return server


async def counted(place: Port) -> dict[str, int]:
    """Pulls of this day by architecture, and all of them."""
    await place.usage.close()
    day = datetime.now(UTC).date().isoformat()
    named = {name: (await place.usage.read("pulls", day, None, name)).count for name in ("amd64", "arm64", "arm")}
    return named | {"all": (await place.usage.read("pulls", day)).count}


@pytest.mark.parametrize(
    ("platforms", "config", "reference", "expected"),
    [
        (("linux/arm64",), None, "arm", {"arm64": 3}),
        (("linux/arm64",), CONFIG, "all", {"arm64": 9}),  # all that is pulled with that token
        (("linux/amd64",), None, "arm", {"amd64": 3}),  # what was asked for, not what there is
        (("linux/amd64", "linux/arm64"), None, "all", {}),
        ((), None, "all", {"amd64": 3, "arm64": 3}),
        ((), None, "arm", {}),  # no index and no config has been read
        ((), CONFIG, "arm", {"arm64": 3}),
        ((), CONFIG, "all", {"amd64": 3, "arm64": 3}),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_pulls_by_token(
    upstream: Start,
    tmp_path: Path,
    redis_url: str,
    platforms: tuple[str, ...],
    config: ContainerConfig | None,
    reference: str,
    expected: dict[str, int],
) -> None:
    server = serving(upstream)
    async with port(tmp_path, redis_url, server) as place:
        repository = await place.submit(f"{server.address}/tool:{reference}", config, *platforms)
        manifests = 3 if reference == "all" else 1
        for _ in range(3):  # also ready-made ones
            await place.pull(f"{repository}/tool", reference)
        got = await counted(place)
    assert got == {"amd64": 0, "arm64": 0, "arm": 0, **expected, "all": 3 * manifests}


async def test_pulls_without_a_token(upstream: Start, tmp_path: Path, redis_url: str) -> None:
    server = serving(upstream)
    path = f"/v2/{server.address}/tool/manifests"
    async with port(tmp_path, redis_url, server) as place:
        await place.get(f"{path}/{ARM.digest}")
        await place.get(f"{path}/all")
        await place.get(f"{path}/{AMD.digest}")
        await place.get(f"{path}/{RISC.digest}")
        assert await counted(place) == {"amd64": 1, "arm64": 0, "arm": 0, "all": 3}


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "_REMEMBERED", 4)
    known = Architectures()
    known.learn(StoredManifest(MULTI.manifest, MULTI.media_type, MULTI.digest))
    assert [known.find(item.digest) for item in (AMD, ARM, RISC, MULTI)] == ["amd64", "arm64", "", ""]
    for number in range(100):
        known.put(f"sha256:{number}", "x86_64")
    known.put("sha256:other", "s390x")
    assert [known.find(f"sha256:{number}") for number in (0, 95, 96, 99)] == ["", "", "amd64", "amd64"]
    assert known.find("sha256:other") == ""

"""Ids of jobs open what is told of them, so whoever can name a private image must not be able to work them out."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from api.building.naming import container_id, hash_attributes
from bench.images import image, layer
from bench.upstream import Upstream
from tests.identified import issue
from tests.scanner_program import write_program
from tests.servers import WaveProxy
from tests.test_access_builds import ALICE, MALLORY, PASSWORD, USER, Site, key_of, site
from wave_proxy.image.mirror import mirror_hash
from wave_proxy.image.reference import parse_reference
from wave_proxy.state.redis import connect
from wave_proxy.state.secret import obtain_secret

__all__ = ["site"]

SECRET = image([layer({"secret.txt": "the eagle flies at midnight"})])
PUBLIC = image([layer({"public.txt": "for everybody"})])


@dataclass
class Scene:
    """The program, with a registry that takes a login, Alice's, for one repository, and none for the other."""

    wave: WaveProxy
    registry: str
    access_token: str

    @property
    def place(self) -> str:
        """Where Alice alone reads."""
        return f"localhost:{self.wave.port}/local/private/{key_of(ALICE)}"

    def ask(self, name: str, **attributes: Any) -> dict[str, Any]:
        return self.wave.submit(
            containerImage=f"{self.registry}/{name}", towerAccessToken=self.access_token, **attributes
        )

    def status(self, path: str) -> int:
        return self.wave.request("GET", f"/v1alpha1/{path}").status


@pytest.fixture
def scene(upstream: Callable[..., Upstream], wave: Callable[..., WaveProxy], redis_url: str, tmp_path: Path) -> Scene:
    registry = upstream(auth="bearer", username=USER, password=PASSWORD)
    registry.add("acme/secret", SECRET, "1")
    registry.add("acme/open", PUBLIC, "1")
    login = f'username = "{USER}"\npassword = "{PASSWORD}"\n'
    proxy = wave(
        redis=redis_url,
        config=f'[scan]\nprogram = "{write_program(tmp_path / "program").path}"\ncache = "{tmp_path}/cache"\n'
        '[build]\nengine = "none"\n'
        f'[registries."{registry.address}"]\ninsecure = true\nallow_private = true\n'
        f'[registries."{registry.address}/acme/open"]\n{login}'
        f'[registries."{registry.address}/acme/secret"]\n{login}users = ["{ALICE}"]\n',
    )
    return Scene(proxy, registry.address, issue(redis_url, ALICE))


def scan_hash(name: str, digest: str = "") -> str:
    return hash_attributes([("image", name), *([("digest", digest)] if digest else [])])


@pytest.mark.parametrize(("name", "content", "known"), [("acme/secret", SECRET, 404), ("acme/open", PUBLIC, 200)])
def test_scans_and_mirrors(scene: Scene, name: str, content: Any, known: int) -> None:
    source = f"{scene.registry}/{name}:1"
    scanned = scene.ask(f"{name}:1", scanMode="required")
    mirrored = scene.ask(f"{name}:1", scanMode="required", mirror=True, buildRepository=scene.place)
    for answer, kind, key in (
        (scanned, "scans", "scanId"),
        (mirrored, "mirrors", "buildId"),
        (mirrored, "scans", "scanId"),
    ):
        assert scene.status(f"{kind}/{answer[key]}") == 200
    target = f"{scene.place}/{name}:1"
    guesses = {
        f"scans/sc-{scan_hash(source, content.digest)}": scanned["scanId"],
        f"mirrors/mr-{mirror_hash(parse_reference(source), parse_reference(target))}": mirrored["buildId"],
        f"scans/sc-{scan_hash(target)}": mirrored["scanId"],
    }
    for guess, told in guesses.items():
        assert scene.status(guess) == known, guess
        assert (guess.partition("/")[2] == told.partition("_")[0]) == (known == 200)
    again = scene.ask(f"{name}:1", scanMode="required")
    assert again["scanId"] == scanned["scanId"]


async def test_all_processes_have_the_same_secret(redis_url: str) -> None:
    found = []
    for _ in range(2):
        redis = connect(redis_url)
        found.append(await obtain_secret(redis))
        await redis.aclose()
    assert found[0] == found[1]
    assert len(found[0]) == 32


def test_builds(site: Site) -> None:
    file = f"FROM {site.vault}/acme/base:1\nRUN true\n"
    repository, _, tag = site.target(ALICE, file).rpartition(":")
    assert tag != container_id(container_file=file, platform="linux/amd64", repository=repository)
    assert site.target(ALICE, file) == f"{repository}:{tag}"
    file = f"FROM {site.vault}/acme/open:1\nRUN true\n"
    repository, _, tag = site.target(ALICE, file).rpartition(":")
    assert tag == container_id(container_file=file, platform="linux/amd64", repository=repository)


def test_a_build_that_takes_layers_from_a_cache_of_ones_own_is_not_that_of_others(site: Site) -> None:
    """Who asks first could else have put anything there, and all who ask for the same would get it."""
    file = f"FROM {site.vault}/acme/open:1\nRUN true\n"
    plain, cached = site.target(MALLORY, file), site.target(MALLORY, file, cacheRepository="quay.io/mallory/cache")
    assert plain != cached
    assert site.target(ALICE, file) == plain

"""A token's settings put into images: every client must accept the result, and every worker must know it."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.images import Image, blob, descriptor, digest_of, image, index, layer
from bench.upstream import Upstream
from tests.cached import files_in
from tests.patience import eventually
from tests.pulling import error_of, inline, port
from tests.servers import redis_server
from wave_proxy.image.oci import DOCKER_INDEX, DOCKER_LAYER, DOCKER_MANIFEST, OCI_INDEX, OCI_LAYER, OCI_MANIFEST
from wave_proxy.image.request import ContainerConfig
from wave_proxy.serve import augment as augment_module

Start = Callable[..., Upstream]

REPOSITORY = "lib/tool"
EXTRA = layer({"opt/extra": "added"})
CHANGES = ContainerConfig(("/opt/extra",), ("run",), ("ADDED=1",), "/work", (inline(EXTRA),))


def tool(family: Any = "oci", platform: str = "linux/amd64") -> Image:
    return image(
        [layer({"bin/tool": platform}), layer({"etc/tool": "x"})], family=family, platform=platform, env=["PATH=/bin"]
    )


def many(family: Any = "oci") -> Image:
    """An index of two platforms and an attestation of one of them."""
    platforms = ("linux/amd64", "linux/arm64", "unknown/unknown")
    return index([tool(family, platform) for platform in platforms], family=family)


def serving(upstream: Start, content: Image, *tags: str) -> Upstream:
    server = upstream()
    server.add(REPOSITORY, content, *(tags or ("1.0",)))
    return server


def gets(server: Upstream, part: str) -> int:
    return sum(request.method == "GET" and part in request.path for request in server.log)


def assert_changed(config: dict[str, Any], original: Image) -> None:
    before = original.config
    assert config["config"] == {
        "Env": ["PATH=/bin", "ADDED=1"],
        "Entrypoint": ["/opt/extra"],
        "Cmd": ["run"],
        "WorkingDir": "/work",
    }
    assert config["rootfs"]["diff_ids"] == [*before["rootfs"]["diff_ids"], EXTRA.diff_id]
    assert len(config["history"]) == 3
    for name in ("os", "architecture", "created"):
        assert config[name] == before[name]


# --- images ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "media_type", "layer_type"),
    [("docker", DOCKER_MANIFEST, DOCKER_LAYER), ("oci", OCI_MANIFEST, OCI_LAYER)],
)
async def test_image(
    upstream: Start, tmp_path: Path, redis_url: str, family: str, media_type: str, layer_type: str
) -> None:
    original = tool(family)
    server = serving(upstream, original)
    async with port(tmp_path, redis_url, server) as place:
        prefix = await place.submit(f"{server.address}/{REPOSITORY}:1.0", CHANGES)
        pulled = await place.pull(f"{prefix}/{REPOSITORY}", "1.0")
        again = await place.pull(f"{prefix}/{REPOSITORY}", pulled.digest)
        untouched = await place.pull(f"{server.address}/{REPOSITORY}", "1.0")
        record = await place.tokens.find_record(prefix.removeprefix("wt/"))
    assert pulled.media_type == media_type
    assert_changed(pulled.config, original)
    assert pulled.layers == (*(item.content for item in original.layers), EXTRA.content)
    added = {"mediaType": layer_type, "size": EXTRA.size, "digest": EXTRA.digest}
    assert pulled.document["layers"] == [*(descriptor(item) for item in original.layers), added]
    assert again == pulled
    assert untouched.manifest == original.manifest
    assert record is not None
    assert (record.source_digest, record.wave_digest) == (original.digest, pulled.digest)


async def test_without_changes_the_image_is_upstreams(upstream: Start, tmp_path: Path, redis_url: str) -> None:
    original = tool()
    server = serving(upstream, original)
    async with port(tmp_path, redis_url, server) as place:
        prefix = await place.submit(f"{server.address}/{REPOSITORY}:1.0")
        pulled = await place.pull(f"{prefix}/{REPOSITORY}", "1.0")
    assert pulled.manifest == original.manifest


@pytest.mark.parametrize("family", ["docker", "oci"])
async def test_index_of_all_platforms(upstream: Start, tmp_path: Path, redis_url: str, family: str) -> None:
    original = many(family)
    server = serving(upstream, original)
    async with port(tmp_path, redis_url, server) as place:
        prefix = await place.submit(f"{server.address}/{REPOSITORY}:1.0", CHANGES)
        pulled = await place.pull(f"{prefix}/{REPOSITORY}", "1.0")
    assert pulled.media_type == (DOCKER_INDEX if family == "docker" else OCI_INDEX)
    for position in (0, 1):
        assert_changed(pulled.children[position].config, original.children[position])
        assert pulled.children[position].layers[-1] == EXTRA.content
    assert pulled.children[2].manifest == original.children[2].manifest
    before, after = json.loads(original.manifest), pulled.document
    assert [entry["platform"] for entry in after["manifests"]] == [entry["platform"] for entry in before["manifests"]]


async def test_index_of_one_platform(upstream: Start, tmp_path: Path, redis_url: str) -> None:
    original = many()
    server = serving(upstream, original)
    async with port(tmp_path, redis_url, server) as place:
        prefix = await place.submit(f"{server.address}/{REPOSITORY}:1.0", CHANGES, "linux/arm64")
        pulled = await place.pull(f"{prefix}/{REPOSITORY}", "1.0")
    assert_changed(pulled.children[1].config, original.children[1])
    for position in (0, 2):
        assert pulled.children[position].manifest == original.children[position].manifest


async def test_platform_that_the_index_lacks(upstream: Start, tmp_path: Path, redis_url: str) -> None:
    server = serving(upstream, many())
    async with port(tmp_path, redis_url, server) as place:
        prefix = await place.submit(f"{server.address}/{REPOSITORY}:1.0", CHANGES, "linux/arm/v7")
        status, code, message = error_of(await place.get(f"/v2/{prefix}/{REPOSITORY}/manifests/1.0"))
    assert (status, code) == (400, "UNSUPPORTED")
    assert "linux/arm/v7" in message
    assert REPOSITORY in message


@pytest.mark.parametrize("original", [tool(), many()], ids=["image", "index"])
async def test_image_named_by_digest(upstream: Start, tmp_path: Path, redis_url: str, original: Image) -> None:
    server = serving(upstream, original)
    tag = original.digest.replace(":", "-")[:19]
    assert len(tag) == len("sha256-") + 12
    async with port(tmp_path, redis_url, server) as place:
        prefix = await place.submit(f"{server.address}/{REPOSITORY}@{original.digest}", CHANGES)
        pulled = await place.pull(f"{prefix}/{REPOSITORY}", tag)
        first = pulled.children[0] if pulled.children else pulled
        assert_changed(first.config, original.children[0] if original.children else original)
        assert (await place.pull(f"{prefix}/{REPOSITORY}", pulled.digest)) == pulled
        # The digest itself is still that of what upstream has; another tag of that form stands for itself.
        assert (await place.pull(f"{prefix}/{REPOSITORY}", original.digest)).manifest == original.manifest
        assert (await place.get(f"/v2/{prefix}/{REPOSITORY}/manifests/sha256-000000000000")).status == 404
    assert tag not in "".join(request.path for request in server.log)


async def test_other_tags_of_the_repository_are_changed_too(upstream: Start, tmp_path: Path, redis_url: str) -> None:
    server = serving(upstream, tool(), "1.0")
    other = image([layer({"bin/tool": "2.0"})], env=["PATH=/bin"])
    server.add(REPOSITORY, other, "2.0")
    async with port(tmp_path, redis_url, server) as place:
        prefix = await place.submit(f"{server.address}/{REPOSITORY}:1.0", CHANGES)
        pulled = await place.pull(f"{prefix}/{REPOSITORY}", "2.0")
    assert pulled.layers == (other.layers[0].content, EXTRA.content)


@pytest.mark.parametrize(
    "changes",
    [{"mediaType": "application/vnd.example"}, {"config": descriptor(blob(b"{}", "application/vnd.example.config"))}],
    ids=["unknown manifest", "unknown config"],
)
async def test_what_is_no_image_stays_as_it_is(
    upstream: Start, tmp_path: Path, redis_url: str, changes: dict[str, Any]
) -> None:
    document = json.loads(tool().manifest) | changes
    content = json.dumps(document).encode()
    artifact = Image(digest_of(content), document["mediaType"], content, (blob(b"{}"), *tool().layers))
    server = serving(upstream, artifact)
    async with port(tmp_path, redis_url, server) as place:
        plain = await place.submit(f"{server.address}/{REPOSITORY}:1.0")
        assert (await place.get(f"/v2/{plain}/{REPOSITORY}/manifests/1.0")).body == content
        prefix = await place.submit(f"{server.address}/{REPOSITORY}:1.0", CHANGES)
        status, code, message = error_of(await place.get(f"/v2/{prefix}/{REPOSITORY}/manifests/1.0"))
    assert (status, code) == (400, "UNSUPPORTED")
    assert "application/vnd.example" in message


@pytest.mark.parametrize("config", [b"{", b"[]", b"{}", b'{"config":{},"rootfs":{"diff_ids":7}}'])
async def test_config_that_is_none(upstream: Start, tmp_path: Path, redis_url: str, config: bytes) -> None:
    bad = blob(config, tool().blobs[0].media_type)
    document = json.loads(tool().manifest) | {"config": descriptor(bad)}
    content = json.dumps(document).encode()
    server = serving(upstream, Image(digest_of(content), OCI_MANIFEST, content, (bad, *tool().layers)))
    async with port(tmp_path, redis_url, server) as place:
        prefix = await place.submit(f"{server.address}/{REPOSITORY}:1.0", CHANGES)
        status, code, _ = error_of(await place.get(f"/v2/{prefix}/{REPOSITORY}/manifests/1.0"))
    assert (status, code) == (502, "UNKNOWN")


# --- whoever asks ------------------------------------------------------------------------------------------------


def all_paths(prefix: str, pulled: Any) -> list[str]:
    """Everything of a pulled image that was made, by digest."""
    paths = [f"/v2/{prefix}/{REPOSITORY}/manifests/{pulled.digest}"]
    if pulled.children:
        return paths + [path for child in pulled.children[:2] for path in all_paths(prefix, child)]
    return [*paths, f"/v2/{prefix}/{REPOSITORY}/blobs/{pulled.document['config']['digest']}"]


@pytest.mark.parametrize("original", [tool(), many()], ids=["image", "index"])
async def test_made_content_is_known_to_other_workers(
    upstream: Start, tmp_path: Path, redis_url: str, original: Image
) -> None:
    server = serving(upstream, original)
    async with port(tmp_path / "a", redis_url, server) as one, port(tmp_path / "b", redis_url, server) as other:
        prefix = await one.submit(f"{server.address}/{REPOSITORY}:1.0", CHANGES)
        pulled = await one.pull(f"{prefix}/{REPOSITORY}", "1.0")
        for path in reversed(all_paths(prefix, pulled)):
            mine, theirs, head = await one.get(path), await other.get(path), await other.request("HEAD", path)
            assert mine.status == theirs.status == head.status == 200
            assert mine.body == theirs.body
            assert head.headers["Content-Length"] == str(len(mine.body))
            assert head.headers["Content-Type"] == mine.headers["Content-Type"] == theirs.headers["Content-Type"]


@pytest.mark.parametrize("original", [tool(), many()], ids=["image", "index"])
async def test_made_content_outlives_memory_and_upstream(
    upstream: Start, tmp_path: Path, redis_url: str, original: Image
) -> None:
    server = serving(upstream, original)
    async with port(tmp_path, redis_url, server) as place:
        prefix = await place.submit(f"{server.address}/{REPOSITORY}:1.0", CHANGES)
        pulled = await place.pull(f"{prefix}/{REPOSITORY}", "1.0")
    server.stop()
    async with port(tmp_path, redis_url, server) as place:
        for path in reversed(all_paths(prefix, pulled)):
            assert digest_of((await place.get(path)).body) == path.rpartition("/")[2]
        assert await place.pull(f"{prefix}/{REPOSITORY}", "1.0") == pulled


async def test_memory_is_bounded(
    upstream: Start, tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(augment_module, "_MEMORY_BYTES", 3000)
    server = serving(upstream, tool())
    async with port(tmp_path, redis_url, server) as place:
        prefixes = [
            await place.submit(f"{server.address}/{REPOSITORY}:1.0", replace(CHANGES, env=(f"N={number}",)))
            for number in range(8)
        ]
        pulled = [await place.pull(f"{prefix}/{REPOSITORY}", "1.0") for prefix in prefixes]
        kept = place.augmenter._memory
        assert 1 <= len(kept) < 8
        assert place.augmenter._bytes == sum(made.size for made in kept.values()) <= 3000
        assert set(place.augmenter._by_digest) == {digest for made in kept.values() for digest in made.contents}
        for prefix, image_before in zip(prefixes, pulled, strict=True):
            assert await place.pull(f"{prefix}/{REPOSITORY}", image_before.digest) == image_before
    assert len({one.digest for one in pulled}) == 8


async def test_equal_requests_give_equal_digests_anywhere(upstream: Start, tmp_path: Path, redis_url: str) -> None:
    server = serving(upstream, many())
    (tmp_path / "other").mkdir()
    with redis_server(tmp_path / "other") as other_redis:
        async with (
            port(tmp_path / "a", redis_url, server) as one,
            port(tmp_path / "b", other_redis, server) as other,
        ):
            pulled = []
            for place in (one, other, one):
                prefix = await place.submit(f"{server.address}/{REPOSITORY}:1.0", CHANGES)
                pulled.append(await place.pull(f"{prefix}/{REPOSITORY}", "1.0"))
    assert pulled[0] == pulled[1] == pulled[2]


async def test_digest_of_an_equal_request_is_known(upstream: Start, tmp_path: Path, redis_url: str) -> None:
    server = serving(upstream, tool())
    async with port(tmp_path / "a", redis_url, server) as one, port(tmp_path / "b", redis_url, server) as other:
        image_name = f"{server.address}/{REPOSITORY}:1.0"
        first, second = await one.submit(image_name, CHANGES), await one.submit(image_name, CHANGES)
        pulled = await one.pull(f"{first}/{REPOSITORY}", "1.0")
        # Nobody has asked the second token for its tag yet, on no worker.
        assert await other.pull(f"{second}/{REPOSITORY}", pulled.digest) == pulled


async def test_made_content_is_for_its_own_tokens(upstream: Start, tmp_path: Path, redis_url: str) -> None:
    server = serving(upstream, tool())
    server.add("other/tool", tool(), "1.0")
    async with port(tmp_path, redis_url, server) as place:
        mine = await place.submit(f"{server.address}/{REPOSITORY}:1.0", CHANGES)
        pulled = await place.pull(f"{mine}/{REPOSITORY}", "1.0")
        config = pulled.document["config"]["digest"]
        strangers = [
            (await place.submit(f"{server.address}/{REPOSITORY}:1.0", replace(CHANGES, env=("A=2",))), REPOSITORY),
            (await place.submit(f"{server.address}/other/tool:1.0", replace(CHANGES, env=("A=2",))), "other/tool"),
            (await place.submit(f"{server.address}/{REPOSITORY}:1.0"), REPOSITORY),
            (server.address, REPOSITORY),
        ]
        for prefix, repository in strangers:
            assert (await place.get(f"/v2/{prefix}/{repository}/manifests/{pulled.digest}")).status == 404
            assert (await place.get(f"/v2/{prefix}/{repository}/blobs/{config}")).status == 404
            assert (await place.request("HEAD", f"/v2/{prefix}/{repository}/blobs/{config}")).status == 404
        for prefix, repository in strangers[2:]:
            assert (await place.get(f"/v2/{prefix}/{repository}/blobs/{EXTRA.digest}")).status == 404


async def test_fifty_at_once_make_it_once(upstream: Start, tmp_path: Path, redis_url: str) -> None:
    server = serving(upstream, many())
    async with port(tmp_path, redis_url, server) as place:
        prefix = await place.submit(f"{server.address}/{REPOSITORY}:1.0", CHANGES)
        path = f"/v2/{prefix}/{REPOSITORY}/manifests/1.0"
        answers = await asyncio.gather(*(place.get(path) for _ in range(50)))
    assert {answer.status for answer in answers} == {200}
    assert len({answer.body for answer in answers}) == 1
    assert gets(server, "/manifests/") == 3  # the index and two images
    assert gets(server, "/blobs/") == 2  # their configs


async def test_failure_is_forgotten(upstream: Start, tmp_path: Path, redis_url: str) -> None:
    server = serving(upstream, tool())
    config = tool().blobs[0]
    server.faults.status, server.faults.fail_times = {config.digest: 500}, 4
    async with port(tmp_path, redis_url, server) as place:
        prefix = await place.submit(f"{server.address}/{REPOSITORY}:1.0", CHANGES)
        status, code, _ = error_of(await place.get(f"/v2/{prefix}/{REPOSITORY}/manifests/1.0"))
        assert (status, code) == (503, "UNKNOWN")
        server.faults.fail_times = 0
        assert_changed((await place.pull(f"{prefix}/{REPOSITORY}", "1.0")).config, tool())


async def test_damaged_config_in_the_store_is_fetched_again(upstream: Start, tmp_path: Path, redis_url: str) -> None:
    server = serving(upstream, tool())
    config = tool().blobs[0]
    async with port(tmp_path, redis_url, server) as place:
        await place.get(f"/v2/{server.address}/{REPOSITORY}/blobs/{config.digest}")
        await eventually(lambda: place.worker.blobs.path(config.digest).exists() and files_in(tmp_path, "spool") == [])
        place.worker.blobs.put(config.digest, b"{}")
        prefix = await place.submit(f"{server.address}/{REPOSITORY}:1.0", CHANGES)
        answers = [await place.get(f"/v2/{prefix}/{REPOSITORY}/manifests/1.0") for _ in range(2)]
    assert [answer.status for answer in answers] == [502, 200]
    assert b"damaged" in answers[0].body


async def test_without_redis_a_known_token_is_served(upstream: Start, tmp_path: Path) -> None:
    server = serving(upstream, tool())
    with redis_server(tmp_path) as url:
        async with port(tmp_path / "data", url, server) as place:
            prefix = await place.submit(f"{server.address}/{REPOSITORY}:1.0", CHANGES)
            # The token is looked up, and nothing else.
            assert (await place.get(f"/v2/{prefix}/{REPOSITORY}/manifests/none")).status == 404
            await place.tokens._redis.config_set("maxmemory", "1")  # from now on, writes are refused
            answer = await place.get(f"/v2/{prefix}/{REPOSITORY}/manifests/1.0")
            assert answer.status == 200
            digest = digest_of(answer.body)
            assert (await place.get(f"/v2/{prefix}/{REPOSITORY}/manifests/{digest}")).body == answer.body

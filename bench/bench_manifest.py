"""Claim: editing a manifest in place is cheaper than decoding and encoding it, also with orjson.

The peers keep the meaning only; the kernel keeps every byte that it does not edit.
"""

import json
from collections.abc import Callable

import orjson
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.images import descriptor, image, index, layer
from tests import oracles
from wave_proxy._fast import manifest as kernels

LAYERS = [layer({f"file-{n}": str(n)}) for n in range(40)]
DIGEST = json.dumps("sha256:" + "cc" * 32).encode()
ITEM = json.dumps(descriptor(LAYERS[0])).encode()
DOCUMENTS = {
    "manifest of 3 layers": image(LAYERS[:3]).manifest,
    "manifest of 40 layers": image(LAYERS).manifest,
    "config of 40 layers": image(LAYERS, env=[f"NAME_{n}=some value" for n in range(40)]).blobs[0].content,
    "index of 8 platforms": index([image(LAYERS[:1], platform=f"linux/arm/v{n}") for n in range(8)]).manifest,
}
PATHS: dict[str, tuple[str | int, ...]] = {
    "manifest of 3 layers": ("config", "digest"),
    "manifest of 40 layers": ("config", "digest"),
    "config of 40 layers": ("config", "Env"),
    "index of 8 platforms": ("manifests", 7, "digest"),
}
ARRAYS: dict[str, tuple[str | int, ...]] = {
    "manifest of 3 layers": ("layers",),
    "manifest of 40 layers": ("layers",),
    "config of 40 layers": ("rootfs", "diff_ids"),
    "index of 8 platforms": ("manifests",),
}
Edit = Callable[[bytes, tuple[str | int, ...], bytes], bytes]


def set_member_with_orjson(document: bytes, path: tuple[str | int, ...], value: bytes) -> bytes:
    """Decode, edit, encode: what a program that need not keep bytes would do."""
    decoded = orjson.loads(document)
    oracles.find(decoded, path[:-1])[path[-1]] = orjson.loads(value)
    return orjson.dumps(decoded)


def append_items_with_orjson(document: bytes, path: tuple[str | int, ...], items: bytes) -> bytes:
    """The same for an array that is there."""
    decoded = orjson.loads(document)
    oracles.find(decoded, path).extend(orjson.loads(b"[" + items + b"]"))
    return orjson.dumps(decoded)


SETTERS = {"kernel": kernels.set_member, "twin": oracles.set_member, "orjson": set_member_with_orjson}
APPENDERS = {"kernel": kernels.append_items, "twin": oracles.append_items, "orjson": append_items_with_orjson}


@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize("edit", SETTERS.values(), ids=SETTERS)
def test_set_member(benchmark: BenchmarkFixture, edit: Edit, name: str) -> None:
    benchmark.group = f"set a member: {name}"
    document, path = DOCUMENTS[name], PATHS[name]
    expected = oracles.set_member(document, path, DIGEST)
    assert json.loads(edit(document, path, DIGEST)) == json.loads(expected)
    benchmark(edit, document, path, DIGEST)


@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize("edit", APPENDERS.values(), ids=APPENDERS)
def test_append_items(benchmark: BenchmarkFixture, edit: Edit, name: str) -> None:
    benchmark.group = f"append an item: {name}"
    document, path = DOCUMENTS[name], ARRAYS[name]
    expected = oracles.append_items(document, path, ITEM)
    assert json.loads(edit(document, path, ITEM)) == json.loads(expected)
    benchmark(edit, document, path, ITEM)

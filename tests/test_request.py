"""Container requests: what inline layers may be, and the form in which requests are kept."""

import gzip
import json
import zlib
from base64 import b64encode
from dataclasses import replace
from hashlib import sha512

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import images
from wave_proxy.errors import DigestMismatch, RequestInvalid, SizeMismatch, WaveError
from wave_proxy.image.oci import digest_of
from wave_proxy.image.request import (
    MAX_TAR_BYTES,
    MAX_TARS_BYTES,
    ContainerConfig,
    ContainerRequest,
    Identity,
    Layer,
    request_from_json,
    request_to_json,
    unpack_inline_layer,
)

MADE = images.layer({"opt/tool": images.random_blob(200_000, 1), "opt/text": "hello " * 10_000})


def inline(content: bytes, tar: bytes, *, form: str = "data") -> Layer:
    """A layer that carries ``content`` and says rightly what it is."""
    packed = content if form == "data" else zlib.compress(content)
    return Layer(f"{form}:{b64encode(packed).decode()}", digest_of(content), len(content), digest_of(tar))


LAYER = inline(MADE.content, gzip.decompress(MADE.content))

# --- inline layers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["data", "gzip"])
def test_unpack(form: str) -> None:
    layer = inline(MADE.content, gzip.decompress(MADE.content), form=form)
    assert layer.tar_digest == MADE.diff_id
    assert unpack_inline_layer(layer)[0] == MADE.content


def test_unpack_sha512_digest() -> None:
    layer = replace(LAYER, gzip_digest=f"sha512:{sha512(MADE.content).hexdigest()}")
    assert unpack_inline_layer(layer)[0] == MADE.content
    with pytest.raises(DigestMismatch):
        unpack_inline_layer(replace(layer, gzip_digest=f"sha512:{'0' * 128}"))


@pytest.mark.parametrize("sizes", [(1,) * 5000, (0, 100_000, 0), (1 << 20, 1 << 15, 7)])
def test_unpack_many_members(sizes: tuple[int, ...]) -> None:
    parts = [images.random_blob(size, seed) for seed, size in enumerate(sizes)]
    content = b"".join(gzip.compress(part, mtime=0) for part in parts)
    assert unpack_inline_layer(inline(content, b"".join(parts)))[0] == content


def test_unpack_highly_compressed() -> None:
    tar = bytes(10 << 20)
    content = gzip.compress(tar, mtime=0)
    assert unpack_inline_layer(inline(content, tar, form="gzip"))[0] == content


@given(st.binary(max_size=300_000), st.integers(0, 9))
def test_unpack_anything_packed(tar: bytes, level: int) -> None:
    content = gzip.compress(tar, level, mtime=0)
    assert unpack_inline_layer(inline(content, tar))[0] == content


@pytest.mark.parametrize("size", [0, MADE.size - 1, MADE.size + 1])
def test_wrong_size(size: int) -> None:
    with pytest.raises(SizeMismatch, match=f"^gzipSize is {size} and the layer has {MADE.size} bytes$"):
        unpack_inline_layer(replace(LAYER, gzip_size=size))


def test_wrong_gzip_digest() -> None:
    wrong = f"sha256:{'0' * 64}"
    with pytest.raises(DigestMismatch, match=f"^gzipDigest is {wrong} and the layer's is {MADE.digest}$"):
        unpack_inline_layer(replace(LAYER, gzip_digest=wrong))


def test_wrong_tar_digest() -> None:
    wrong = f"sha256:{'0' * 64}"
    with pytest.raises(DigestMismatch, match=f"^tarDigest is {wrong} and the unpacked layer's is {MADE.diff_id}$"):
        unpack_inline_layer(replace(LAYER, tar_digest=wrong))


@pytest.mark.parametrize(
    "location",
    [
        pytest.param("data:====", id="padding"),
        pytest.param("data:QUJ", id="cut"),
        pytest.param("data:QUJD\n", id="newline"),
        pytest.param("data:-_-_", id="url-alphabet"),
        pytest.param("data:QÜJD", id="not-ascii"),
        pytest.param("gzip:QUJD", id="not-deflated"),
        pytest.param(f"gzip:{b64encode(zlib.compress(b'abc')[:-2]).decode()}", id="deflate-cut"),
        pytest.param("gzip:", id="empty-deflate"),
    ],
)
def test_wrong_location(location: str) -> None:
    with pytest.raises(RequestInvalid, match=r"^location is not valid after '(data|gzip):'"):
        unpack_inline_layer(replace(LAYER, location=location))


def test_error_does_not_repeat_a_long_location() -> None:
    with pytest.raises(RequestInvalid) as caught:
        unpack_inline_layer(replace(LAYER, location=f"data:{'!' * 1_000_000}"))
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"no gzip", id="text"),
        pytest.param(zlib.compress(b"x"), id="zlib"),
        pytest.param(MADE.content[:-1], id="trailer-cut"),
        pytest.param(MADE.content[:1000], id="cut"),
        pytest.param(MADE.content[:5], id="header-cut"),
        pytest.param(MADE.content + b"garbage", id="garbage-behind"),
        pytest.param(MADE.content + MADE.content[:100], id="second-member-cut"),
        pytest.param(MADE.content[:-5] + b"\0" + MADE.content[-4:], id="checksum"),
    ],
)
def test_no_gzip(content: bytes) -> None:
    with pytest.raises(RequestInvalid, match=r"^the layer is not gzip data: "):
        unpack_inline_layer(inline(content, b""))


def test_limits_of_layers() -> None:
    assert (MAX_TAR_BYTES, MAX_TARS_BYTES) == (256 << 20, 512 << 20)


@pytest.mark.parametrize("size", [100_000, 100_001])
def test_bomb_of_tar(size: int) -> None:
    layer = inline(gzip.compress(bytes(size), mtime=0), bytes(size))
    if size <= 100_000:
        assert unpack_inline_layer(layer, 100_000)[0]
    else:
        with pytest.raises(RequestInvalid, match="unpacks to more than 100000 bytes"):
            unpack_inline_layer(layer, 100_000)


def test_bomb_of_nothing() -> None:
    empty = gzip.compress(b"", mtime=0)
    assert unpack_inline_layer(inline(empty * 90, b""), 100_000)[1] > 90_000
    with pytest.raises(RequestInvalid, match="unpacks to more than 100000 bytes"):
        unpack_inline_layer(inline(empty * 100, b""), 100_000)


def test_bomb_of_deflate() -> None:
    bomb = zlib.compress(bytes((16 << 20) + 1))
    with pytest.raises(RequestInvalid, match="over 16 MiB"):
        unpack_inline_layer(replace(LAYER, location=f"gzip:{b64encode(bomb).decode()}"))


@given(st.sampled_from(["data:", "gzip:"]), st.binary(max_size=60) | st.just(MADE.content[:100]), st.booleans())
def test_any_location_is_refused_in_our_words(form: str, content: bytes, deflate: bool) -> None:
    text = b64encode(zlib.compress(content) if deflate else content).decode()
    layer = Layer(f"{form}{text}", digest_of(content), len(content), f"sha256:{'0' * 64}")
    with pytest.raises(WaveError):
        unpack_inline_layer(layer)


# --- words of a request ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("location", "is_inline"),
    [("data:QUJD", True), ("gzip:QUJD", True), ("https://h/x.tar.gz", False), ("docker://r/v2/a/blobs/d", False)],
)
def test_inline(location: str, is_inline: bool) -> None:
    assert replace(LAYER, location=location).is_inline == is_inline


def test_fusion_layers_fit_one_architecture() -> None:
    fusion = replace(LAYER, location="https://fusionfs.seqera.io/releases/v2.4/fusion-arm64.tar.gz")
    assert (fusion.fits("arm64"), fusion.fits("amd64")) == (True, False)
    assert LAYER.fits("amd64")


@pytest.mark.parametrize(
    ("config", "truth"),
    [
        (ContainerConfig(), False),
        (ContainerConfig((), (), (), "", ()), False),
        (ContainerConfig(entrypoint=("",)), True),
        (ContainerConfig(cmd=("x",)), True),
        (ContainerConfig(env=("A=1",)), True),
        (ContainerConfig(working_dir="/"), True),
        (ContainerConfig(layers=(LAYER,)), True),
    ],
)
def test_empty_config_changes_nothing(config: ContainerConfig, truth: bool) -> None:
    assert bool(config) == truth


def test_secrets_do_not_show() -> None:
    identity = Identity(user_id=1, access_token="eyJ-access", refresh_token="eyJ-refresh")
    shown = repr(ContainerRequest("docker.io/library/busybox:latest", identity=identity))
    assert "user_id=1" in shown
    assert "eyJ" not in shown
    assert "data:" not in repr(LAYER)


# --- the form in which requests are kept -------------------------------------------------------------------------

TEXTS = st.text(max_size=10)
TUPLES = st.lists(TEXTS, max_size=3).map(tuple)
LAYERS = st.builds(Layer, TEXTS, TEXTS, st.integers(0, 2**53), TEXTS, TEXTS)
IDENTITIES = st.builds(
    Identity,
    user_id=st.none() | st.integers(1, 2**53),
    email=TEXTS,
    workspace_id=st.none() | st.integers(1, 2**53),
    access_token=TEXTS,
    refresh_token=TEXTS,
    endpoint=TEXTS,
    workflow_id=TEXTS,
)
REQUESTS = st.builds(
    ContainerRequest,
    image=TEXTS,
    config=st.builds(ContainerConfig, TUPLES, TUPLES, TUPLES, TEXTS, st.lists(LAYERS, max_size=2).map(tuple)),
    platforms=TUPLES,
    identity=IDENTITIES,
    fingerprint=TEXTS,
    timestamp=TEXTS,
    ip_address=TEXTS,
    includes=TUPLES,
    dry_run=st.booleans(),
    created=st.floats(0, 2e9),
    expires=st.floats(0, 2e9),
)


@given(REQUESTS)
def test_round_trip(request: ContainerRequest) -> None:
    kept = json.dumps(request_to_json(request))
    assert request_from_json(json.loads(kept)) == request


def test_newer_members_are_ignored() -> None:
    request = ContainerRequest("docker.io/library/busybox:latest", identity=Identity(user_id=7))
    document = request_to_json(request)
    document["later"] = 1
    document["identity"]["later"] = 2
    assert request_from_json(document) == request


@pytest.mark.parametrize(
    ("location", "version"),
    [
        ("https://fusionfs.seqera.io/releases/pkg/2/4/fusion-amd64.tar.gz", "2.4"),
        ("https://fusionfs.seqera.io/releases/v2.1.3a-arm64.json", "2.1.3a"),
        ("https://elsewhere.example/releases/pkg/2/4/fusion-amd64.tar.gz", ""),
        ("data:", ""),
    ],
)
def test_fusion_is_found_among_the_layers(location: str, version: str) -> None:
    other = Layer("https://elsewhere.example/a.tar.gz", LAYER.gzip_digest, 1, LAYER.tar_digest)
    config = ContainerConfig(layers=(other, replace(other, location=location)))
    assert config.fusion_version == version
    assert config.has_fusion is bool(version)


def test_what_is_empty_is_not_kept() -> None:
    request = ContainerRequest("docker.io/library/busybox:latest", created=1.0, expires=2.0)
    assert request_to_json(request) == {"image": request.image, "created": 1.0, "expires": 2.0}

"""Names of mirrors, and what a copy of a manifest has to bring along."""

from typing import Any

import orjson
import pytest

from bench.images import digest_of
from wave_proxy.errors import RequestInvalid, UpstreamError
from wave_proxy.image.mirror import is_registry_alone, mirror_hash, mirror_target, read_parts, target_registry
from wave_proxy.image.oci import DOCKER_MANIFEST, DOCKER_SCHEMA1, OCI_INDEX, OCI_MANIFEST
from wave_proxy.image.reference import parse_reference

SOURCE = parse_reference("docker.io/source/image:latest")
DIGEST = f"sha256:{'a' * 64}"
FOREIGN = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
NOT_TO_GO = "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"


@pytest.mark.parametrize(
    ("place", "source", "name"),
    [  # the first three are vectors V22
        ("quay.io", "source/image", "quay.io/source/image:latest"),
        ("quay.io/lib", "source/image", "quay.io/lib/source/image:latest"),
        ("quay.io/lib/", "source/image", "quay.io/lib/source/image:latest"),
        ("quay.io/lib", "ubuntu", "quay.io/lib/library/ubuntu:latest"),
        ("localhost:5000", "quay.io/a/b:1", "localhost:5000/a/b:1"),
        ("acme", "quay.io/a/b:1", "docker.io/acme/a/b:1"),
        ("quay.io", f"a/b@{DIGEST}", f"quay.io/a/b@{DIGEST}"),
        ("quay.io", f"a/b:1@{DIGEST}", f"quay.io/a/b@{DIGEST}"),
    ],
)
def test_target(place: str, source: str, name: str) -> None:
    assert str(mirror_target(parse_reference(source), place)) == name
    assert target_registry(place) == name.partition("/")[0]


@pytest.mark.parametrize("place", ["quay.io/UPPER", "quay.io//x", "", f"quay.io/{'x' * 250}"])
def test_no_target(place: str) -> None:
    with pytest.raises(RequestInvalid):
        mirror_target(SOURCE, place)


@pytest.mark.parametrize(
    ("place", "is_alone"),
    [
        ("quay.io", True),
        ("localhost:5000", True),
        ("127.0.0.1:5000", True),
        ("[::1]:5000", True),
        ("acme", False),
        ("quay.io/lib", False),
        ("ubuntu:22.04", False),
        ("quay.io:x", False),
    ],
)
def test_registry_alone(place: str, is_alone: bool) -> None:
    assert is_registry_alone(place) is is_alone


def test_ids_are_those_of_source_and_target() -> None:
    places = [mirror_target(SOURCE, place) for place in ("quay.io", "quay.io/lib")]
    hashes = [mirror_hash(source, place) for source in (SOURCE, parse_reference("a/b:1")) for place in places]
    assert len(set(hashes)) == 4
    assert mirror_hash(SOURCE, places[0]) == hashes[0]
    assert all(len(one) == 16 for one in hashes)


def descriptor(text: str, media_type: str = "application/octet-stream", **more: Any) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest_of(text.encode()), "size": len(text), **more}


def names(content: dict[str, Any], media_type: str) -> tuple[list[str], list[str], list[str]]:
    parts = read_parts(orjson.dumps(content), media_type)
    blobs, manifests, elsewhere = (
        [one.digest for one in some] for some in (parts.blobs, parts.manifests, parts.elsewhere)
    )
    return blobs, manifests, elsewhere


def digests(*texts: str) -> list[str]:
    return [digest_of(text.encode()) for text in texts]


def test_parts_of_a_manifest() -> None:
    layers = [descriptor("one"), descriptor("two"), descriptor("one")]
    manifest = {"schemaVersion": 2, "config": descriptor("config"), "layers": layers}
    assert names(manifest, OCI_MANIFEST) == (digests("config", "one", "two"), [], [])


def test_layers_from_elsewhere_are_not_copied() -> None:
    layers = [
        descriptor("kept"),
        descriptor("foreign", FOREIGN, urls=["https://foreign.test/x"]),
        descriptor("bound", NOT_TO_GO),
        descriptor("linked", urls=["https://linked.test/x"]),
        descriptor("not linked", urls=[]),
    ]
    manifest = {"schemaVersion": 2, "mediaType": DOCKER_MANIFEST, "config": descriptor("config"), "layers": layers}
    assert names(manifest, DOCKER_MANIFEST) == (
        digests("config", "kept", "not linked"),
        [],
        digests("foreign", "bound", "linked"),
    )


def test_parts_of_an_index() -> None:
    index = {"manifests": [descriptor("amd64", OCI_MANIFEST), descriptor("more", OCI_INDEX)]}
    assert names(index, OCI_INDEX) == ([], digests("amd64", "more"), [])


@pytest.mark.parametrize(
    ("content", "found"),
    [
        pytest.param({"blobs": [descriptor("a")]}, (digests("a"), [], []), id="an artifact manifest"),
        pytest.param(
            {"config": descriptor("c"), "layers": [descriptor("l")]}, (digests("c", "l"), [], []), id="like an image"
        ),
        pytest.param({"manifests": [descriptor("m")]}, ([], digests("m"), []), id="like an index"),
        pytest.param({"config": "text", "layers": {"a": 1}}, ([], [], []), id="something else"),
    ],
)
def test_types_that_nobody_knows_are_read_by_their_shape(
    content: dict[str, Any], found: tuple[list[str], list[str], list[str]]
) -> None:
    assert names(content, "application/vnd.acme.thing.v9+json") == found


@pytest.mark.parametrize(
    ("content", "media_type", "problem"),
    [
        pytest.param({"schemaVersion": 1, "fsLayers": []}, DOCKER_SCHEMA1, "schema 1", id="schema 1"),
        pytest.param({"layers": [{"digest": DIGEST}]}, OCI_MANIFEST, "no descriptor", id="layer without size"),
        pytest.param({"layers": ["x"]}, "application/x", "no descriptor", id="layer that is none"),
        pytest.param({"layers": [], "manifests": []}, OCI_INDEX, "both", id="two things at once"),
    ],
)
def test_what_can_not_be_copied(content: dict[str, Any], media_type: str, problem: str) -> None:
    with pytest.raises(UpstreamError, match=problem):
        read_parts(orjson.dumps(content), media_type)

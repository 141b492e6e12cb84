"""Digests, platforms (``wave.md`` V7 and V8) and the reading of manifests, honest or not."""

import json
from hashlib import sha512
from typing import Any

import pytest

from bench.images import Family, image, index, layer
from wave_proxy.errors import DigestInvalid, RequestInvalid, UpstreamError
from wave_proxy.image.oci import (
    ACCEPT_MANIFESTS,
    DOCKER_CONFIG,
    DOCKER_INDEX,
    DOCKER_MANIFEST,
    DOCKER_SCHEMA1,
    DOCKER_SCHEMA1_SIGNED,
    LINUX_AMD64,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER,
    OCI_MANIFEST,
    Descriptor,
    Platform,
    digest_of,
    matches,
    parse_digest,
    parse_platform,
    parse_platforms,
    read_json_object,
    read_manifest,
    sniff_media_type,
)

DIGEST = f"sha256:{'0a' * 32}"
EMPTY = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

# --- digests -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [DIGEST, EMPTY, f"sha512:{'ab' * 64}"])
def test_digest(text: str) -> None:
    assert parse_digest(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sha256:",
        "latest",
        DIGEST[:-1],
        DIGEST + "0",
        DIGEST.upper(),
        DIGEST.replace("0a", "0A"),
        DIGEST + "\n",
        f"sha512:{'0a' * 32}",
        f"sha256:{'0a' * 64}",
        f"md5:{'0a' * 16}",
        " " + DIGEST,
        DIGEST.replace("0a", "0g"),
    ],
)
def test_no_digest(text: str) -> None:
    with pytest.raises(DigestInvalid, match="is not a digest"):
        parse_digest(text)


def test_digest_of() -> None:
    assert digest_of(b"") == EMPTY
    assert digest_of(b"x", "sha512") == f"sha512:{sha512(b'x').hexdigest()}"
    assert matches(b"", EMPTY)
    assert matches(b"x", f"sha512:{sha512(b'x').hexdigest()}")
    assert not matches(b"x", EMPTY)


# --- platforms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *((text, "linux/amd64") for text in ("x86_64", "x86-64", "amd64", "linux/amd64", "linux/x86_64", " amd64 ")),
        *((text, "linux/arm/v7") for text in ("arm", "linux/arm", "linux/arm/7", "linux/arm/v7")),
        *((text, "linux/arm/v5") for text in ("linux/arm/5", "linux/arm/v5")),
        *((text, "linux/arm64") for text in ("arm64", "aarch64", "linux/arm64", "linux/aarch64", "linux/arm64/v8")),
        ("linux/arm64/8", "linux/arm64"),
        ("linux/arm64/v7", "linux/arm64/v7"),
        ("linux/amd64/v3", "linux/amd64/v3"),
        ("windows/amd64", "windows/amd64"),
    ],
)
def test_platform(text: str, expected: str) -> None:
    parsed = parse_platform(text)
    assert str(parsed) == expected
    assert parse_platform(expected) == parsed


@pytest.mark.parametrize(
    "text", ["foo", "", "  ", "linux/", "/amd64", "linux/foo", "a/amd64/v1/x", "linux//v7", "null"]
)
def test_no_platform(text: str) -> None:
    with pytest.raises(RequestInvalid, match="container platform"):
        parse_platform(text)


def test_platforms() -> None:
    assert [str(p) for p in parse_platforms("linux/amd64,linux/arm64")] == ["linux/amd64", "linux/arm64"]
    assert parse_platforms("amd64") == (LINUX_AMD64,)
    with pytest.raises(RequestInvalid):
        parse_platforms("linux/amd64,")


@pytest.mark.parametrize(
    ("wanted", "os", "architecture", "variant"),
    [
        ("amd64", "linux", "amd64", ""),
        ("amd64", "linux", "x86_64", ""),
        ("arm64", "linux", "arm64", ""),
        ("arm64", "linux", "arm64", "v8"),
        ("arm64", "linux", "arm64", "8"),
        ("linux/arm64", "linux", "aarch64", "v8"),
        ("linux/arm64/8", "linux", "arm64", "v8"),
        ("arm", "linux", "arm", "v7"),
        ("linux/arm/v5", "linux", "arm", "v5"),
        ("linux/amd64/v2", "linux", "amd64", "v2"),
    ],
)
def test_platform_matches(wanted: str, os: str, architecture: str, variant: str) -> None:
    assert parse_platform(wanted).matches(os, architecture, variant)


@pytest.mark.parametrize(
    ("wanted", "os", "architecture", "variant"),
    [
        ("amd64", "linux", "arm64", ""),
        ("windows/amd64", "linux", "amd64", ""),
        ("linux/arm64/v7", "linux", "arm64", ""),
        ("linux/arm64/v7", "linux", "arm64", "v8"),
        ("linux/arm64/v8", "linux", "arm64", "v9"),
        ("amd64", "linux", "amd64", "v2"),
        ("arm", "linux", "arm", ""),
        ("arm", "linux", "arm", "v6"),
        ("amd64", "linux", "386", ""),
        ("amd64", "unknown", "unknown", ""),
    ],
)
def test_platform_does_not_match(wanted: str, os: str, architecture: str, variant: str) -> None:
    assert not parse_platform(wanted).matches(os, architecture, variant)


# --- manifests ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "config_type"), [("oci", OCI_CONFIG), ("docker", DOCKER_CONFIG)])
def test_read_image_manifest(family: Family, config_type: str) -> None:
    made = image([layer({"a": "1"}), layer({"b": "2"})], family=family)
    manifest = read_manifest(made.manifest, made.media_type)
    assert manifest.config == Descriptor(config_type, made.blobs[0].digest, made.blobs[0].size)
    assert manifest.layers == tuple(Descriptor(b.media_type, b.digest, b.size) for b in made.layers)
    assert (manifest.is_image, manifest.is_index, manifest.entries) == (True, False, ())
    assert [named.digest for named in manifest.descriptors()] == [blob.digest for blob in made.blobs]


@pytest.mark.parametrize("family", ["oci", "docker"])
def test_read_index(family: Family) -> None:
    children = [image([layer({"a": "1"})], family=family, platform=p) for p in ("linux/amd64", "linux/arm/v7")]
    made = index(children, family=family)
    manifest = read_manifest(made.manifest, made.media_type)
    assert (manifest.is_index, manifest.is_image, manifest.config, manifest.layers) == (True, False, None, ())
    assert [entry.platform for entry in manifest.entries] == [LINUX_AMD64, Platform("linux", "arm", "v7")]
    assert [named.digest for named in manifest.descriptors()] == [child.digest for child in children]
    assert manifest.entries[0].descriptor.size == len(children[0].manifest)


def test_media_type_may_be_missing_in_the_body() -> None:
    made = image([layer({"a": "1"})], media_type_in_body=False)
    assert read_manifest(made.manifest, OCI_MANIFEST).is_image


def test_artifact_is_no_image() -> None:
    config = {"mediaType": "application/vnd.oci.empty.v1+json", "digest": DIGEST, "size": 2}
    manifest = read_manifest(json.dumps({"config": config, "layers": []}).encode(), OCI_MANIFEST)
    assert not manifest.is_image
    assert manifest.descriptors() == (Descriptor(config["mediaType"], DIGEST, 2),)  # type: ignore[arg-type]


def test_unknown_type_passes_unread() -> None:
    manifest = read_manifest(b"\xff not JSON", "application/vnd.example")
    assert (manifest.media_type, manifest.descriptors()) == ("application/vnd.example", ())
    assert not manifest.is_image
    assert not manifest.is_index


def test_entry_without_platform() -> None:
    entries = [{"digest": DIGEST, "size": 1}, {"digest": DIGEST, "size": 1, "platform": {"os": "linux"}}]
    entries.append({"digest": DIGEST, "size": 1, "platform": {"os": "linux", "architecture": "arm", "variant": 7}})
    manifest = read_manifest(json.dumps({"manifests": entries}).encode(), OCI_INDEX)
    assert [entry.platform for entry in manifest.entries] == [None, None, Platform("linux", "arm")]


CONFIG: dict[str, Any] = {"mediaType": OCI_CONFIG, "digest": DIGEST, "size": 2}


@pytest.mark.parametrize(
    ("document", "media_type", "message"),
    [
        ({"config": CONFIG, "layers": [], "manifests": []}, OCI_MANIFEST, "both layers and manifests"),
        ({"config": CONFIG, "layers": [], "manifests": []}, OCI_INDEX, "both layers and manifests"),
        ({"layers": [], "manifests": []}, DOCKER_INDEX, "both layers and manifests"),
        ({"config": CONFIG, "manifests": []}, OCI_INDEX, "both layers and manifests"),
        ({"config": CONFIG, "layers": [], "manifests": None}, OCI_MANIFEST, "both layers and manifests"),
        ({"mediaType": OCI_INDEX, "config": CONFIG, "layers": []}, OCI_MANIFEST, "says it is"),
        ({"mediaType": OCI_MANIFEST, "manifests": []}, OCI_INDEX, "says it is"),
        ({"mediaType": DOCKER_MANIFEST, "config": CONFIG, "layers": []}, OCI_MANIFEST, "says it is"),
        ({"mediaType": 7, "config": CONFIG, "layers": []}, OCI_MANIFEST, "says it is 7"),
    ],
)
def test_confusion_is_refused(document: dict[str, Any], media_type: str, message: str) -> None:
    with pytest.raises(UpstreamError, match=message):
        read_manifest(json.dumps(document).encode(), media_type)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "manifest is not JSON"),
        (b"{", "manifest is not JSON"),
        (b"\xff", "manifest is not JSON"),
        (b"[]", "manifest is not a JSON object"),
        (b"null", "manifest is not a JSON object"),
        (b"{}", "config is no descriptor"),
        (b'{"config": []}', "config is no descriptor"),
        (b'{"config": {"digest": "sha256:00", "size": 1}}', "is not a digest"),
        (b'{"config": {"digest": "%s", "size": -1}}' % DIGEST.encode(), "config is no descriptor"),
        (b'{"config": {"digest": "%s", "size": 1125899906842625}}' % DIGEST.encode(), "config is no descriptor"),
        (b'{"config": {"digest": "%s", "size": "1"}}' % DIGEST.encode(), "config is no descriptor"),
        (b'{"config": {"digest": "%s", "size": 1.5}}' % DIGEST.encode(), "config is no descriptor"),
        (b'{"config": {"digest": "%s"}}' % DIGEST.encode(), "config is no descriptor"),
        (b'{"config": {"digest": "%s", "size": 1}, "layers": {}}' % DIGEST.encode(), "layers is not an array"),
        (b'{"config": {"digest": "%s", "size": 1}, "layers": [1]}' % DIGEST.encode(), "layer is no descriptor: 1"),
    ],
)
def test_bad_image_manifest(content: bytes, message: str) -> None:
    with pytest.raises(UpstreamError, match=message):
        read_manifest(content, OCI_MANIFEST)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b'{"manifests": 1}', "manifests is not an array"), (b'{"manifests": [null]}', "entry is no descriptor: None")],
)
def test_bad_index(content: bytes, message: str) -> None:
    with pytest.raises(UpstreamError, match=message):
        read_manifest(content, OCI_INDEX)


def test_read_json_object_names_what_it_read() -> None:
    assert read_json_object(b'{"a": 1}', "thing") == {"a": 1}
    with pytest.raises(UpstreamError, match=r"^thing is not a JSON object$"):
        read_json_object(b"7", "thing")


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"mediaType": DOCKER_MANIFEST, "manifests": []}, DOCKER_MANIFEST),
        ({"schemaVersion": 2, "manifests": []}, OCI_INDEX),
        ({"schemaVersion": 2, "config": {}, "layers": []}, OCI_MANIFEST),
        ({"schemaVersion": 1, "signatures": [], "fsLayers": []}, DOCKER_SCHEMA1_SIGNED),
        ({"schemaVersion": 1, "fsLayers": []}, DOCKER_SCHEMA1),
        ({}, "application/octet-stream"),
        ([], "application/octet-stream"),
        ({"mediaType": 1}, "application/octet-stream"),
        ({"mediaType": "application/x\r\nX: y", "manifests": []}, OCI_INDEX),
        ({"mediaType": "application/\u00ff", "manifests": []}, OCI_INDEX),
        ({"mediaType": "application", "manifests": []}, OCI_INDEX),
        ({"mediaType": f"application/{'x' * 128}", "manifests": []}, OCI_INDEX),
    ],
)
def test_sniff(document: object, expected: str) -> None:
    assert sniff_media_type(json.dumps(document).encode()) == expected


def test_sniff_of_no_json() -> None:
    assert sniff_media_type(b"<html>") == "application/octet-stream"


def test_every_known_type_is_asked_for() -> None:
    asked = ACCEPT_MANIFESTS.split(", ")
    assert {OCI_INDEX, OCI_MANIFEST, DOCKER_INDEX, DOCKER_MANIFEST} <= set(asked)
    assert OCI_LAYER not in asked

"""Vectors of ids and hashes: V1, V2, V4, V5, V34 (``wave.md`` §12)."""

import pytest

from api.building.naming import hash_attributes
from wave_proxy.image.platform import pairing_key, session_key


def listed(*values: str | None) -> str:
    """The hash of values without names, each followed by a separator, all by an end: one pair, to hash_attributes."""
    first, *others = (value or "" for value in values)
    return hash_attributes([(first, "\x1c".join([*others, ""]) if others else "")])


def test_v1_values_without_names() -> None:
    assert listed("a") == "bcf5c2d233d23f0f"


@pytest.mark.parametrize(
    ("attributes", "wanted"),
    [
        pytest.param({"image": "x"}, "94be9fbddcc3af8e", id="V4 x"),
        pytest.param({"image": "x", "digest": "y"}, "00769af315dcb1fe", id="V4 x with digest y"),
        pytest.param({"image": "docker.io/foo/bar:latest"}, "057d44d43bb7f81c", id="V4 foo/bar"),
    ],
)
def test_v4_scan_ids(attributes: dict[str, str], wanted: str) -> None:
    assert hash_attributes(attributes.items()) == wanted


HUB, QUAY = "docker.io/v2/hello-world", "quay.io/v2/hello-world"


@pytest.mark.parametrize(
    ("path", "user", "wanted"),
    [
        pytest.param(f"{HUB}/manifests/latest", None, "be6fd07e23f274ad", id="V5 tag"),
        pytest.param(f"{HUB}/manifests/sha256:123", None, "898374c25821d23a", id="V5 digest"),
        pytest.param(f"{HUB}/blobs/latest", None, "b25b1e82515d2e36", id="V5 blob"),
        pytest.param(f"{QUAY}/blobs/latest", None, "fe6919f2911429bd", id="V5 another registry"),
        pytest.param(f"{QUAY}/blobs/latest", "1", "e2b64069506321b8", id="V5 user 1"),
        pytest.param(f"{QUAY}/blobs/latest", "2", "1170f763c5344958", id="V5 user 2"),
    ],
)
def test_v5_routes(path: str, user: str | None, wanted: str) -> None:
    """Nothing of ours is filed under these: content is shared by digest, and who may read it is asked apart."""
    identity = listed(user, None, None, None, None, None)  # id, e-mail, workspace, token, endpoint, workflow
    assert listed(path, identity) == wanted


def test_v34_keys_of_pairings_and_of_refreshed_tokens() -> None:
    assert pairing_key("tower", "https://api.cloud.seqera.io") == "88c1f586e515fa84fb71dbc42d9f185d"
    assert session_key("https://api.cloud.seqera.io", "TOKEN") == "9ab5a225586002ae071e30cc4f3ee487"

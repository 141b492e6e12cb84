"""Manifests of the first schema: their config, layers and digest."""

import json
from base64 import urlsafe_b64encode
from pathlib import Path
from typing import Any

import pytest

from wave_proxy.errors import UpstreamError
from wave_proxy.image.oci import digest_of
from wave_proxy.image.schema1 import config_of, layers_of, unsigned_digest

SIGNED = (Path(__file__).parent / "data" / "schema1.json").read_bytes()
DIGEST = "sha256:939ebea44a15e8d0992d1ce11885bb3a5b82d5c902e63d834a3fbf35939ecc5a"  # as a registry has it


def signed(**header: Any) -> bytes:
    """A manifest with a signature that says that of itself."""
    protected = urlsafe_b64encode(json.dumps(header).encode()).decode().rstrip("=")
    return json.dumps({"schemaVersion": 1, "signatures": [{"protected": protected}]}).encode()


def test_a_signed_manifest() -> None:
    document = json.loads(SIGNED)
    assert unsigned_digest(SIGNED) == DIGEST
    assert config_of(document)["config"]["Cmd"] == ["/bin/run"]
    assert layers_of(document) == [digest_of(b"lower layer"), digest_of(b"upper layer")]


@pytest.mark.parametrize(
    "content",
    [
        b'{"schemaVersion": 1}',
        b'{"schemaVersion": 1, "signatures": []}',
        b'{"schemaVersion": 1, "signatures": [{"protected": "%%%"}]}',
        b'{"schemaVersion": 1, "signatures": [{"protected": "b25l"}]}',
        signed(formatLength=-1, formatTail="fQ"),
        signed(formatLength=10**9, formatTail="fQ"),
        signed(formatLength="1", formatTail="fQ"),
        signed(formatLength=1),
    ],
    ids=lambda content: content.decode()[:60],
)
def test_without_a_signature_that_can_be_taken_out_it_is_the_contents_own(content: bytes) -> None:
    assert unsigned_digest(content) == digest_of(content)


@pytest.mark.parametrize(
    "document",
    [{}, {"history": []}, {"history": [{}]}, {"history": [{"v1Compatibility": "no json"}]}, {"history": "none"}],
    ids=json.dumps,
)
def test_no_config(document: dict[str, Any]) -> None:
    with pytest.raises(UpstreamError, match="history"):
        config_of(document)


@pytest.mark.parametrize(
    "document", [{}, {"fsLayers": [{}]}, {"fsLayers": ["sha256:0"]}, {"fsLayers": {}}], ids=json.dumps
)
def test_no_layers(document: dict[str, Any]) -> None:
    with pytest.raises(UpstreamError, match="fsLayers"):
        layers_of(document)

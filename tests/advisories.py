"""A vulnerability database as trivy reads it, with advisories of our own: a bbolt file whose one leaf holds all."""

import json
from collections.abc import Mapping
from pathlib import Path
from struct import pack

Bucket = Mapping[str, "Bucket | bytes"]

_PAGE = 4096
_META, _LEAF, _FREELIST = 4, 2, 16
_MAGIC, _VERSION = 0xED0CDAED, 2
_ELEMENT_BYTES = 16


def write_database(folder: Path, release: str, advisories: Mapping[str, Mapping[str, str]]) -> None:
    """Write ``db/trivy.db`` and its metadata into a cache folder of trivy.

    ``advisories`` says for each package of the ``release`` (``debian 12``) which advisory is fixed in which version;
    all of them are critical.
    """
    packages = {
        name: {number: _json({"FixedVersion": fixed}) for number, fixed in fixes.items()}
        for name, fixes in advisories.items()
    }
    numbers = {number for fixes in advisories.values() for number in fixes}
    known = {number: _json({"Title": f"{number} was planted", "Severity": "CRITICAL"}) for number in numbers}
    source = _json({"ID": "debian", "Name": "Planted", "URL": "https://advisories.test"})
    root: Bucket = {release: packages, "data-source": {release: source}, "vulnerability": known}
    target = folder / "db"
    target.mkdir(parents=True)
    (target / "trivy.db").write_bytes(_file(root))
    dates = {"NextUpdate": "2199-01-01T00:00:00Z", "UpdatedAt": "2026-01-01T00:00:00Z"}
    (target / "metadata.json").write_text(json.dumps({"Version": 2, **dates, "DownloadedAt": dates["UpdatedAt"]}))


def _json(document: Mapping[str, str]) -> bytes:
    return json.dumps(document).encode()


def _file(root: Bucket) -> bytes:
    """Two meta pages, a free list, and the root bucket's leaf. Source: bbolt's page.go and db.go."""
    leaf = _leaf(root, 3)
    pages = -(-len(leaf) // _PAGE)
    leaf = leaf[:12] + pack("<I", pages - 1) + leaf[16:]
    free = pack("<QHHI", 2, _FREELIST, 0, 0)
    metas = [pack("<QHHI", number, _META, 0, 0) + _meta(number, 3 + pages) for number in (0, 1)]
    return b"".join(page.ljust(_PAGE, b"\0") for page in (*metas, free)) + leaf.ljust(pages * _PAGE, b"\0")


def _meta(transaction: int, pages: int) -> bytes:
    content = pack("<IIIIQQQQQ", _MAGIC, _VERSION, _PAGE, 0, 3, 0, 2, pages, transaction)
    checksum = 0xCBF29CE484222325  # FNV-1a
    for byte in content:
        checksum = (checksum ^ byte) * 0x100000001B3 % (1 << 64)
    return content + pack("<Q", checksum)


def _leaf(bucket: Bucket, number: int) -> bytes:
    """A leaf page with its header. Buckets in it are inline: a header without a root, and a leaf of their own."""
    elements, content = b"", b""
    for index, (name, value) in enumerate(sorted(bucket.items())):
        is_bucket = not isinstance(value, bytes)
        stored = value if isinstance(value, bytes) else pack("<QQ", 0, 0) + _leaf(value, 0)
        key = name.encode()
        position = (len(bucket) - index) * _ELEMENT_BYTES + len(content)
        elements += pack("<IIII", int(is_bucket), position, len(key), len(stored))
        content += key + stored
    return pack("<QHHI", number, _LEAF, len(bucket), 0) + elements + content

"""The manifest store: byte for byte, in memory and on disk."""

from pathlib import Path

import pytest

from bench.images import image, layer
from wave_proxy.cache import manifests as manifests_module
from wave_proxy.cache.manifests import ManifestStore, StoredManifest
from wave_proxy.errors import StorageFull
from wave_proxy.image.oci import OCI_MANIFEST, digest_of

TOOL = image([layer({"bin/tool": "x"})])
MANIFEST = StoredManifest(TOOL.manifest, TOOL.media_type, TOOL.digest)


def stored(content: bytes, media_type: str = OCI_MANIFEST) -> StoredManifest:
    return StoredManifest(content, media_type, digest_of(content))


def the_file(root: Path) -> Path:
    (path,) = (path for path in (root / "manifests").rglob("*") if path.is_file())
    return path


@pytest.mark.parametrize(
    "manifest",
    [
        MANIFEST,
        stored(b'{ "schemaVersion" : 2 ,\r\n\t"layers": null,"layers":[] }\n\n'),
        stored(b"\x00\xff\n\r\n", "application/octet-stream"),
        stored(b""),
        StoredManifest(TOOL.manifest, "a/b", digest_of(TOOL.manifest, "sha512")),
    ],
    ids=["image", "odd JSON", "no JSON", "empty", "sha512"],
)
def test_bytes_come_back_as_they_were(tmp_path: Path, manifest: StoredManifest) -> None:
    store = ManifestStore(tmp_path)
    assert store.find(manifest.digest) is None
    store.put(manifest)
    assert store.find(manifest.digest) == manifest
    assert ManifestStore(tmp_path).find(manifest.digest) == manifest


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[:-1] + b"x",
        lambda content: content + b" ",
        lambda content: b"",
        lambda content: content.partition(b"\n")[0],
        lambda content: b"\xff" + content[1:],
    ],
    ids=["cut", "last byte", "longer", "empty", "no content", "media type"],
)
def test_damaged_file_is_dropped(tmp_path: Path, damage: object) -> None:
    assert callable(damage)
    ManifestStore(tmp_path).put(MANIFEST)
    path = the_file(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    store = ManifestStore(tmp_path)
    assert store.find(MANIFEST.digest) is None
    assert not path.exists()
    store.put(MANIFEST)
    assert ManifestStore(tmp_path).find(MANIFEST.digest) == MANIFEST


def test_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifests_module, "_MEMORY_BYTES", 1000)
    store = ManifestStore(tmp_path)
    contents = [stored(b"%3d" % number * 50) for number in range(20)]
    for manifest in contents:
        store.put(manifest)
        store.put(manifest)
        assert store.find(contents[0].digest) == contents[0]
    assert store._bytes == sum(len(manifest.content) for manifest in store._memory.values()) <= 1000
    assert contents[0].digest in store._memory  # used last
    assert [store.find(manifest.digest) for manifest in contents] == contents


def test_one_manifest_may_be_larger_than_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifests_module, "_MEMORY_BYTES", 10)
    store = ManifestStore(tmp_path)
    store.put(MANIFEST)
    assert store.find(MANIFEST.digest) == MANIFEST
    assert len(store._memory) == 1


def test_full_disk_leaves_it_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise StorageFull("full")

    monkeypatch.setattr(manifests_module, "write_whole", full)  # blobs' own tests fill a real disk
    store = ManifestStore(tmp_path)
    store.put(MANIFEST)
    assert store.find(MANIFEST.digest) == MANIFEST
    assert ManifestStore(tmp_path).find(MANIFEST.digest) is None

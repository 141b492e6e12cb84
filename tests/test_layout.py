"""OCI image layouts: what they hold, and those that are not what they seem."""

import json
import os
from pathlib import Path

import pytest

from bench.images import image, index, layer, random_blob
from tests.pushing import write_layout
from wave_proxy.image.oci import OCI_INDEX, Platform, digest_of
from wave_proxy.upstream.layout import platform_of, read_layout

IMAGE = image([layer({"a": random_blob(300_000, 1)}), layer({"b": "text"})])
ARM = image([layer({"c": "arm"})], platform="linux/arm64")


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    return write_layout(tmp_path / "layout", IMAGE)


def write_layout_of_several(folder: Path) -> Path:
    """The layout that an engine leaves which builds for one platform after the other."""
    write_layout(folder, index([IMAGE, ARM]))
    entries = [
        {"mediaType": one.media_type, "digest": one.digest, "size": len(one.manifest), "annotations": {"x": "y"}}
        for one in (IMAGE, ARM)
    ]
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": entries}))
    return folder


def test_images_for_several_platforms_get_an_index(tmp_path: Path) -> None:
    folder = write_layout_of_several(tmp_path / "several")
    content = read_layout(folder)
    assert json.loads(content.manifest) == {
        "schemaVersion": 2,
        "mediaType": OCI_INDEX,
        "manifests": [
            {
                "mediaType": one.media_type,
                "digest": one.digest,
                "size": len(one.manifest),
                "platform": {"os": "linux", "architecture": architecture},
            }
            for one, architecture in ((IMAGE, "amd64"), (ARM, "arm64"))
        ],
    }
    assert (content.media_type, content.digest, content.blobs) == (OCI_INDEX, digest_of(content.manifest), ())
    assert [child.digest for child in content.children] == [IMAGE.digest, ARM.digest]
    assert [platform_of(folder, child) for child in content.children] == [
        Platform("linux", "amd64"),
        Platform("linux", "arm64"),
    ]


def test_an_index_is_read_as_it_is(tmp_path: Path) -> None:
    both = index([IMAGE, ARM])
    content = read_layout(write_layout(tmp_path / "both", both))
    assert content.manifest == both.manifest
    assert len(content.children) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no index", "not an OCI image layout"),
        ("two images", "exactly one image"),
        ("manifest", "is another one"),
        ("linked manifest", "can't be read"),
        ("linked folder", "can't be read"),
        ("linked layout", "not an OCI image layout"),
        ("pipe", "not a regular file"),
        ("blob size", "the manifest says"),
        ("blob missing", "can't be read"),
        ("path", "is not a digest"),
    ],
)
def test_broken_layout_is_refused(layout: Path, change: str, message: str) -> None:
    index_file = layout / "index.json"
    blobs = layout / "blobs" / "sha256"
    document = json.loads(index_file.read_text())
    match change:
        case "no index":
            index_file.unlink()
        case "two images":
            index_file.write_text(json.dumps({"manifests": document["manifests"] * 2}))
        case "manifest":
            (blobs / IMAGE.digest[7:]).write_bytes(IMAGE.manifest + b" ")
        case "linked manifest":
            (blobs / IMAGE.digest[7:]).rename(layout / "elsewhere")
            (blobs / IMAGE.digest[7:]).symlink_to(layout / "elsewhere")
        case "linked folder":
            blobs.rename(layout / "elsewhere")
            blobs.symlink_to(layout / "elsewhere")
        case "linked layout":
            layout.rename(layout.with_name("elsewhere"))
            layout.symlink_to(layout.with_name("elsewhere"))
        case "pipe":
            (blobs / IMAGE.digest[7:]).unlink()
            os.mkfifo(blobs / IMAGE.digest[7:])
        case "blob size":
            (blobs / IMAGE.layers[0].digest[7:]).write_bytes(b"")
        case "blob missing":
            (blobs / IMAGE.layers[0].digest[7:]).unlink()
        case "path":
            index_file.write_text(json.dumps({"manifests": [{"digest": "../../../etc/passwd"}]}))
    with pytest.raises(Exception, match=message):
        read_layout(layout)

"""skopeo, which fetches as podman and buildah do, on images of every kind."""

import json
from pathlib import Path

from bench.images import digest_of
from tests.clients.programs import Client, needs
from tests.clients.scene import Case, Scene, every_case, every_tag, read_layout, walk
from tests.servers import split_image

pytestmark = needs("skopeo", "Debian package skopeo")
skopeo = Client("skopeo")


def copy(target: str, destination: str) -> None:
    skopeo("--insecure-policy", "copy", "--all", "--src-tls-verify=false", f"docker://{target}", destination)


def inspect(target: str, *options: str) -> str:
    return skopeo("inspect", "--tls-verify=false", *options, f"docker://{target}")


def read_dir(folder: Path, digest: str) -> bytes:
    name = digest.removeprefix("sha256:")
    blob = folder / name
    return (blob if blob.exists() else folder / f"{name}.manifest.json").read_bytes()


@every_case
def test_copy_to_a_folder_keeps_every_byte(scene: Scene, case: Case, folder: Path) -> None:
    target = scene.target(case)
    copy(target, f"dir:{folder}")
    manifest = (folder / "manifest.json").read_bytes()
    found = walk(manifest, lambda digest: read_dir(folder, digest))
    assert len(found) == len(list(folder.iterdir())) - 1  # manifest.json is found, `version` is not
    assert digest_of(manifest) == scene.pulled(target).digest
    assert (manifest == scene.source(case).image.manifest) is not case.changed


@every_case
def test_copy_to_an_oci_layout(scene: Scene, case: Case, folder: Path) -> None:
    target = scene.target(case)
    copy(target, f"oci:{folder}:copied")
    (entry,) = json.loads((folder / "index.json").read_bytes())["manifests"]
    found = walk(read_layout(folder, entry["digest"]), lambda digest: read_layout(folder, digest))
    assert found == {f"sha256:{path.name}" for path in (folder / "blobs" / "sha256").iterdir()}
    pulled = scene.pulled(target)
    blobs = {digest_of(layer) for image in (pulled, *pulled.children) for layer in image.layers}
    assert blobs <= found
    if "vnd.oci" in pulled.media_type:  # Docker's manifests are converted
        assert entry["digest"] == pulled.digest


@every_case
def test_inspect(scene: Scene, case: Case) -> None:
    target = scene.target(case)
    seen = json.loads(inspect(target))
    expected = scene.source(case).expected_config(changed=case.changed)
    pulled = scene.pulled(target)
    assert seen["Name"] == f"{target.partition('/')[0]}/{split_image(target)[0]}"
    assert seen["Digest"] == pulled.digest
    assert seen["RepoTags"] == ["1.0"]
    assert seen["Env"] == expected["config"]["Env"]
    assert seen["Layers"] == [digest_of(layer) for layer in scene.native(target).layers]


@every_case
def test_inspect_raw(scene: Scene, case: Case) -> None:
    target = scene.target(case)
    assert inspect(target, "--raw").encode() == scene.pulled(target).manifest


@every_tag
def test_inspect_config(scene: Scene, case: Case) -> None:
    seen = json.loads(inspect(scene.target(case), "--config"))
    expected = scene.source(case).expected_config(changed=case.changed)
    assert {name: seen["config"].get(name) for name in expected["config"]} == expected["config"]
    assert seen["rootfs"]["diff_ids"] == expected["diff_ids"]
    assert len(seen["history"]) == len(seen["rootfs"]["diff_ids"])


def test_list_tags(scene: Scene) -> None:
    name = scene.target(Case("oci", True, "tag")).rpartition(":")[0]
    seen = json.loads(skopeo("list-tags", "--tls-verify=false", f"docker://{name}"))
    assert seen == {"Repository": name, "Tags": ["1.0"]}


def test_a_name_without_a_token(scene: Scene) -> None:
    assert inspect(scene.direct(), "--raw").encode() == scene.source(Case("oci", False, "tag")).image.manifest


def test_an_unknown_token(scene: Scene) -> None:
    finished = skopeo.attempt("inspect", "--tls-verify=false", f"docker://{scene.unknown()}")
    assert finished.returncode != 0
    assert "name unknown" in finished.stderr or "manifest unknown" in finished.stderr

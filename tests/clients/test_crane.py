"""crane (go-containerregistry, which Apptainer uses too) on images of every kind."""

import json
import tarfile
from pathlib import Path

from bench.images import digest_of
from tests.clients.programs import Client, needs
from tests.clients.scene import (
    ARCHITECTURE,
    CHANGES,
    OTHER_ARCHITECTURE,
    Case,
    Scene,
    every_case,
    every_tag,
    read_layout,
    walk,
)

pytestmark = needs("crane", "go install github.com/google/go-containerregistry/cmd/crane@v0.20.3")
crane = Client("crane")


@every_case
def test_pull_to_an_oci_layout(scene: Scene, case: Case, folder: Path) -> None:
    target = scene.target(case)
    crane("pull", "--format=oci", target, folder)
    (entry,) = json.loads((folder / "index.json").read_bytes())["manifests"]
    found = walk(read_layout(folder, entry["digest"]), lambda digest: read_layout(folder, digest))
    assert found == {f"sha256:{path.name}" for path in (folder / "blobs" / "sha256").iterdir()}
    assert entry["digest"] == scene.pulled(target).digest


@every_tag
def test_pull_to_a_tarball(scene: Scene, case: Case, tmp_path: Path) -> None:
    target, file = scene.target(case), tmp_path / "image.tar"
    crane("pull", f"--platform=linux/{ARCHITECTURE}", target, file)
    with tarfile.open(file) as tar:
        contents = {member.name: tar.extractfile(member) for member in tar}
        found = {name: digest_of(content.read()) for name, content in contents.items() if content}
    pulled = scene.native(target)
    layers = [digest_of(layer) for layer in pulled.layers]
    config = pulled.document["config"]["digest"]
    assert found[config] == config
    assert [found[f"{digest.removeprefix('sha256:')}.tar.gz"] for digest in layers] == layers


@every_case
def test_digest(scene: Scene, case: Case) -> None:
    target = scene.target(case)
    assert crane("digest", target).strip() == scene.pulled(target).digest


@every_case
def test_validate(scene: Scene, case: Case) -> None:
    # It unpacks gzip only; of other layers it can check no more than that manifest and config agree.
    options = ["--fast"] if case.kind == "zstd" else []
    assert "PASS" in crane("validate", *options, "--remote", scene.target(case))


@every_tag
def test_config(scene: Scene, case: Case) -> None:
    seen = json.loads(crane("config", f"--platform=linux/{ARCHITECTURE}", scene.target(case)))
    expected = scene.source(case).expected_config(changed=case.changed)
    assert seen["config"] == expected["config"]
    assert seen["rootfs"]["diff_ids"] == expected["diff_ids"]


def test_every_platform_of_an_index_is_changed(scene: Scene) -> None:
    target = scene.target(Case("index", True, "tag"))
    for architecture in (ARCHITECTURE, OTHER_ARCHITECTURE):
        seen = json.loads(crane("config", f"--platform=linux/{architecture}", target))
        assert (seen["architecture"], seen["config"]["Cmd"]) == (architecture, CHANGES["cmd"])


def test_the_added_files_are_in_the_file_system(scene: Scene, tmp_path: Path) -> None:
    file = tmp_path / "files.tar"
    crane("export", f"--platform=linux/{ARCHITECTURE}", scene.target(Case("index", True, "tag")), file)
    with tarfile.open(file) as tar:
        note, kind = tar.extractfile("opt/added/note"), tar.extractfile("opt/base/kind")
        assert note is not None
        assert kind is not None
        assert (note.read(), kind.read()) == (b"added by wave\n", f"index {ARCHITECTURE}\n".encode())


def test_list_tags(scene: Scene) -> None:
    name = scene.target(Case("oci", True, "tag")).rpartition(":")[0]
    assert crane("ls", name) == "1.0\n"


def test_a_name_without_a_token(scene: Scene) -> None:
    assert crane("digest", scene.direct()).strip() == scene.source(Case("oci", False, "tag")).image.digest


def test_an_unknown_token(scene: Scene) -> None:
    finished = crane.attempt("manifest", scene.unknown())
    assert finished.returncode != 0
    assert "NAME_UNKNOWN" in finished.stderr or "MANIFEST_UNKNOWN" in finished.stderr

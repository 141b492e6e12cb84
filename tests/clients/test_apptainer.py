"""Apptainer, or Singularity: docker:// images of every kind made into SIF files."""

from pathlib import Path

import pytest

from tests.clients.programs import Client, find
from tests.clients.scene import Case, Scene, every_case

NAME = next((name for name in ("apptainer", "singularity") if find(name)), "")
pytestmark = pytest.mark.skipif(not NAME, reason="neither apptainer nor singularity is installed (apptainer.org)")


@pytest.fixture(scope="module")
def apptainer(tmp_path_factory: pytest.TempPathFactory) -> Client:
    """Apptainer with a cache of its own."""
    folder = tmp_path_factory.mktemp("apptainer")
    names = [f"{prefix}_{use}" for prefix in ("APPTAINER", "SINGULARITY") for use in ("CACHEDIR", "TMPDIR")]
    for name in names:
        (folder / name).mkdir()
    return Client(NAME, env={name: str(folder / name) for name in names})


@every_case
def test_pull(apptainer: Client, scene: Scene, case: Case, tmp_path: Path) -> None:
    file = tmp_path / "image.sif"
    apptainer("pull", "--no-https", file, f"docker://{scene.target(case)}")
    kind = apptainer("exec", "--no-home", file, "/bin/cat", "/opt/base/kind")
    assert kind.startswith(f"{case.kind} ")
    if case.changed:
        assert apptainer("exec", "--no-home", file, "/bin/cat", "/opt/added/note") == "added by wave\n"


def test_run(apptainer: Client, scene: Scene, tmp_path: Path) -> None:
    file = tmp_path / "image.sif"
    apptainer("pull", "--no-https", file, f"docker://{scene.target(Case('index', True, 'tag'))}")
    printed = apptainer("run", "--no-home", "--cleanenv", file)
    assert printed.startswith("argument one\nargument two\nargument three words here\n")
    assert "greeting good morning, kept yes" in printed
    assert printed.endswith("added by wave\n")


def test_an_unknown_token(apptainer: Client, scene: Scene, tmp_path: Path) -> None:
    finished = apptainer.attempt("pull", "--no-https", tmp_path / "image.sif", f"docker://{scene.unknown()}")
    assert finished.returncode != 0
    assert not (tmp_path / "image.sif").exists()

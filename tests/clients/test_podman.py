"""podman pull and podman run (containers/storage, as in Buildah and CRI-O) on images of every kind."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.clients.programs import Client, find, needs, skip_unless_it_runs
from tests.clients.scene import CHANGED_SAYS, SAYS, Case, Scene, every_case, every_tag
from tests.servers import split_image

pytestmark = [
    needs("podman", "Debian package podman"),
    pytest.mark.skipif(os.geteuid() != 0, reason="podman without root needs subordinate ids, which few machines have"),
]

# What podman asks for by default is more than root may have in a virtual machine or in another container.
RUN = ("run", "--rm", "--network=none", "--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024")


@pytest.fixture(scope="module")
def podman() -> Iterator[Client]:
    """podman with an empty store of its own."""
    with TemporaryDirectory(prefix="podman-") as name:
        options = [f"--root={name}/root", f"--runroot={name}/run", f"--tmpdir={name}/tmp", "--storage-driver=vfs"]
        options += ["--cgroup-manager=cgroupfs", "--events-backend=none"]
        if find("runc"):
            options.append("--runtime=runc")  # crun, the default, refuses some arrangements of control groups
        yield Client("podman", *options)


@pytest.fixture(scope="module")
def runner(podman: Client, tmp_path_factory: pytest.TempPathFactory) -> Client:
    """The same, where containers run at all."""
    skip_unless_it_runs(podman, RUN, tmp_path_factory.mktemp("probe"))
    return podman


def pull(podman: Client, scene: Scene, case: Case) -> str:
    """Pull what a case names; gives the name."""
    target = scene.target(case)
    podman("pull", "--quiet", "--tls-verify=false", target)
    return target


@every_case
def test_pull(podman: Client, scene: Scene, case: Case) -> None:
    target = pull(podman, scene, case)
    (seen,) = json.loads(podman("image", "inspect", target))
    expected = scene.source(case).expected_config(changed=case.changed)
    assert {name: seen["Config"].get(name) for name in expected["config"]} == expected["config"]
    assert seen["RootFS"]["Layers"] == expected["diff_ids"]
    assert f"{target.partition('/')[0]}/{split_image(target)[0]}@{scene.pulled(target).digest}" in seen["RepoDigests"]
    podman("image", "rm", target)  # what comes next fetches again


@every_tag
def test_run(runner: Client, scene: Scene, case: Case) -> None:
    target = pull(runner, scene, case)
    assert runner(*RUN, target) == (CHANGED_SAYS if case.changed else SAYS)


def test_the_added_files_are_in_the_image(podman: Client, scene: Scene) -> None:
    target = pull(podman, scene, Case("redirect", True, "tag"))
    folder = Path(podman("image", "mount", target).strip())
    assert (folder / "opt/added/note").read_text() == "added by wave\n"
    assert (folder / "opt/base/kind").read_text().startswith("redirect ")
    podman("image", "unmount", target)


def test_an_unknown_token(podman: Client, scene: Scene) -> None:
    finished = podman.attempt("pull", "--tls-verify=false", scene.unknown())
    assert finished.returncode != 0
    assert "name unknown" in finished.stderr or "manifest unknown" in finished.stderr

"""docker pull and docker run on images of every kind, with a daemon of the test's own."""

import json
from collections.abc import Iterator

import pytest

from tests.clients.programs import Client, docker_daemon, reason_to_skip_daemon, skip_unless_it_runs
from tests.clients.scene import CHAIN, CHANGED_SAYS, SAYS, Case, Scene, every_case, every_tag
from tests.servers import split_image

SKIP = reason_to_skip_daemon("dockerd", "docker", "Debian packages docker.io, and docker-cli where it exists")
pytestmark = pytest.mark.skipif(bool(SKIP), reason=SKIP)

ZSTD_API = (1, 42)  # Docker 23
RUN = ("run", "--rm", "--network=none")


@pytest.fixture(scope="module")
def docker() -> Iterator[Client]:
    """docker with a daemon whose store is empty."""
    with docker_daemon() as client:
        yield client


@pytest.fixture(scope="module")
def runner(docker: Client, tmp_path_factory: pytest.TempPathFactory) -> Client:
    """The same, where containers run at all."""
    skip_unless_it_runs(docker, RUN, tmp_path_factory.mktemp("probe"))
    return docker


def skip_unless_readable(docker: Client, case: Case) -> None:
    if case.kind == "zstd":
        major, _, minor = docker("version", "--format={{.Server.APIVersion}}").strip().partition(".")
        if (int(major), int(minor)) < ZSTD_API:
            version = docker("version", "--format={{.Server.Version}}").strip()
            pytest.skip(f"Docker {version} does not know zstd layers, wherever they come from; Docker 23 does")


def pull(docker: Client, scene: Scene, case: Case) -> str:
    """Pull what a case names; gives the name."""
    skip_unless_readable(docker, case)
    target = scene.target(case)
    docker("pull", target)
    return target


@every_case
def test_pull(docker: Client, scene: Scene, case: Case) -> None:
    target = pull(docker, scene, case)
    (seen,) = json.loads(docker("image", "inspect", target))
    expected = scene.source(case).expected_config(changed=case.changed)
    assert {name: seen["Config"].get(name) for name in expected["config"]} == expected["config"]
    assert seen["RootFS"]["Layers"] == expected["diff_ids"]
    assert f"{target.partition('/')[0]}/{split_image(target)[0]}@{scene.pulled(target).digest}" in seen["RepoDigests"]
    docker("image", "rm", target)  # what comes next fetches again


@every_tag
def test_run(runner: Client, scene: Scene, case: Case) -> None:
    target = pull(runner, scene, case)
    assert runner(*RUN, target) == (CHANGED_SAYS if case.changed else SAYS)


def test_run_pulls_by_itself_and_takes_other_arguments(runner: Client, scene: Scene) -> None:
    target = scene.target(Case("index", True, "asked"))
    printed = runner(*RUN, "--workdir=/opt", "--env=KEPT=no", target, "mine")
    assert printed == (
        f"argument one\nargument mine\ndirectory /opt\ngreeting good morning, kept no, chain {CHAIN}\nadded by wave\n"
    )


def test_the_old_entrypoint_is_in_the_changed_image(runner: Client, scene: Scene) -> None:
    target = pull(runner, scene, Case("docker", True, "tag"))
    printed = runner(*RUN, "--entrypoint=/opt/base/entry", target)
    assert printed.startswith("directory /opt/added\ngreeting good morning")


def test_a_name_without_a_token(docker: Client, scene: Scene) -> None:
    docker("pull", scene.direct())
    (seen,) = json.loads(docker("image", "inspect", scene.direct()))
    assert seen["RootFS"]["Layers"] == scene.source(Case("oci", False, "tag")).image.config["rootfs"]["diff_ids"]


def test_an_unknown_token_is_a_clear_error_and_no_login_prompt(docker: Client, scene: Scene) -> None:
    finished = docker.attempt("pull", scene.unknown())
    assert finished.returncode != 0
    assert "not found" in finished.stderr
    assert "login" not in finished.stderr

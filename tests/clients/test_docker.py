"""docker pull and docker run on images of every kind, with a daemon of the test's own."""

import json
from collections.abc import Iterator

import pytest

from tests.clients.programs import Docker, docker_daemon, reason_to_skip_docker
from tests.clients.scene import (
    CHAIN,
    CHANGED_SAYS,
    SAYS,
    Case,
    Scene,
    every_case,
    every_tag,
    reason_to_skip_running,
)
from tests.servers import split_image

pytestmark = pytest.mark.skipif(bool(reason_to_skip_docker()), reason=reason_to_skip_docker())
can_run = pytest.mark.skipif(bool(reason_to_skip_running()), reason=reason_to_skip_running())

FIRST_WITH_ZSTD = 23


@pytest.fixture(scope="module")
def docker() -> Iterator[Docker]:
    """A daemon with an empty store."""
    with docker_daemon() as daemon:
        yield daemon


def skip_unless_readable(docker: Docker, case: Case) -> None:
    version = docker("version", "--format", "{{.Server.Version}}").strip()
    if case.kind == "zstd" and int(version.partition(".")[0]) < FIRST_WITH_ZSTD:
        pytest.skip(f"Docker {version} does not know zstd layers, whichever registry they come from")


def pull(docker: Docker, scene: Scene, case: Case) -> str:
    """Pull what a case names; gives the name."""
    skip_unless_readable(docker, case)
    target = scene.target(case)
    docker("pull", target)
    return target


@every_case
def test_pull(docker: Docker, scene: Scene, case: Case) -> None:
    target = pull(docker, scene, case)
    (seen,) = json.loads(docker("image", "inspect", target))
    expected = scene.source(case).expected_config(changed=case.changed)
    assert {name: seen["Config"].get(name) for name in expected["config"]} == expected["config"]
    assert seen["RootFS"]["Layers"] == expected["diff_ids"]
    assert f"{target.partition('/')[0]}/{split_image(target)[0]}@{scene.pulled(target).digest}" in seen["RepoDigests"]
    docker("image", "rm", target)  # what comes next fetches again


@can_run
@every_tag
def test_run(docker: Docker, scene: Scene, case: Case) -> None:
    target = pull(docker, scene, case)
    assert docker("run", "--rm", "--network=none", target) == (CHANGED_SAYS if case.changed else SAYS)


@can_run
def test_run_pulls_by_itself_and_takes_other_arguments(docker: Docker, scene: Scene) -> None:
    target = scene.target(Case("index", True, "asked"))
    printed = docker("run", "--rm", "--network=none", "--workdir=/opt", "--env=KEPT=no", target, "mine")
    assert printed == (
        "argument one\nargument mine\ndirectory /opt\n"
        f"greeting good morning, kept no, chain {CHAIN}\nadded by wave\n"
    )


@can_run
def test_the_old_entrypoint_is_in_the_changed_image(docker: Docker, scene: Scene) -> None:
    target = pull(docker, scene, Case("docker", True, "tag"))
    printed = docker("run", "--rm", "--network=none", "--entrypoint=/opt/base/entry", target)
    assert printed.startswith("directory /opt/added\ngreeting good morning")


def test_a_name_without_a_token(docker: Docker, scene: Scene) -> None:
    docker("pull", scene.direct())
    (seen,) = json.loads(docker("image", "inspect", scene.direct()))
    assert seen["RootFS"]["Layers"] == scene.source(Case("oci", False, "tag")).image.config["rootfs"]["diff_ids"]


def test_an_unknown_token_is_a_clear_error_and_no_login_prompt(docker: Docker, scene: Scene) -> None:
    finished = docker.attempt("pull", scene.unknown())
    assert finished.returncode != 0
    assert "name unknown" in finished.stderr or "manifest unknown" in finished.stderr
    assert "login" not in finished.stderr

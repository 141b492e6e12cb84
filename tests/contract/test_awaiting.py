"""Builds that really run, awaited by each generation of the clients."""

import json
from collections.abc import Iterator
from itertools import count

import pytest

from tests.building.works import Works, open_works, why_no_builds
from tests.contract.nextflow import Nextflow
from tests.contract.nextflow import read_build_status as read_for_nextflow
from tests.contract.wave_cli import WaveCli, base64, held_manifest, read_build_status, read_submitted, submission
from tests.patience import until
from tests.servers import WaveProxy

pytestmark = pytest.mark.skipif(bool(why_no_builds()), reason=why_no_builds())

_NUMBERS = count()


@pytest.fixture(scope="module")
def works(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Works]:
    """A registry with a base image."""
    with open_works(tmp_path_factory.mktemp("works")) as opened:
        yield opened


@pytest.fixture(scope="module")
def wave(works: Works) -> Iterator[WaveProxy]:
    """The program, which builds."""
    with works.wave() as started:
        yield started


@pytest.fixture
def file(works: Works) -> str:
    """A container file that nobody else has."""
    return base64(f"FROM {works.base}\nRUN echo {next(_NUMBERS)} >/made\n")


def test_a_command_line_of_today(wave: WaveProxy, file: str) -> None:
    cli = WaveCli(wave.address, pause_s=0.1)
    answer = cli.submit(submission(containerFile=file))
    ended = cli.await_(answer)
    assert ended is not None
    assert (ended["succeeded"], ended["buildId"]) == (True, answer["buildId"])
    again = cli.submit(submission(containerFile=file))
    assert (again["buildId"], again["cached"], again["succeeded"]) == (answer["buildId"], True, True)
    assert cli.await_(again) is None
    assert wave.pull(again["targetImage"]).digest == wave.pull(answer["targetImage"]).digest


def test_the_log_of_a_build(wave: WaveProxy, file: str) -> None:
    """The API page's pair: a text, that ends with where the image went."""
    cli = WaveCli(wave.address, pause_s=0.1)
    answer = cli.submit(submission(containerFile=file))
    cli.await_(answer)
    log = cli.get(f"/v1alpha1/builds/{answer['buildId']}/logs")
    assert log.status == 200
    assert (log.header("Content-Type") or "").startswith("text/plain")
    lines = log.text.splitlines()
    assert f"pushing to {answer['containerImage']}" in log.text
    assert f"pushed {answer['containerImage']}@sha256:" in lines[-1]


def test_a_command_line_of_version_1_3(wave: WaveProxy, file: str) -> None:
    cli = WaveCli(wave.address)
    path = f"/v1alpha1/builds/{cli.submit(submission(containerFile=file))['buildId']}/status"
    until(lambda: read_build_status(cli.get(path))["status"] == "COMPLETED", "the build does not end")
    assert read_build_status(cli.get(path))["succeeded"] is True


def test_a_command_line_of_version_1_0(wave: WaveProxy, file: str) -> None:
    oldest = {"towerEndpoint": "https://api.tower.nf", "timestamp": "2023-07-01T10:00:00+02:00"}
    body = json.dumps({"containerFile": file, **oldest}).encode()
    answer = read_submitted(WaveCli(wave.address).post("/container-token", body))
    assert answer["buildId"]
    manifest = held_manifest(wave.address, answer["targetImage"])
    assert manifest.status == 200
    assert manifest.header("Docker-Content-Digest") == wave.pull(answer["targetImage"]).digest


def test_nextflow(wave: WaveProxy, file: str) -> None:
    run = Nextflow(wave.address)
    answer = run.submit(containerFile=file)
    run.await_(answer)
    found = read_for_nextflow(run.ask("GET", f"/v1alpha1/builds/{answer['buildId']}/status").document())
    assert (found["status"], found["succeeded"]) == ("COMPLETED", True)
    wave.pull(answer["targetImage"])

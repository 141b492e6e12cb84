"""``--mirror``, ``--scan-mode`` and Nextflow's properties for both: exchanged with the whole program, and awaited."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.upstream import Upstream
from tests.contract import nextflow
from tests.contract.conftest import TOOLS, Service, add_images
from tests.contract.nextflow import Nextflow
from tests.contract.wave_cli import Failed, WaveCli, headers, read_status, submission
from tests.contract.wire import Connection
from tests.scanner_program import write_program
from tests.servers import WaveProxy

V2 = "/v1alpha2/container"


# --- mirrors ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(service: Service) -> str:
    """A repository of the server itself, below which mirrors may be."""
    return f"localhost:{service.wave.port}/local/mirror"


def test_the_command_line_awaits_a_mirror(service: Service, place: str) -> None:
    cli = WaveCli(service.address, pause_s=0.05)
    body = submission(
        containerImage="acme/tools:v1", mirror=True, buildRepository=f"{place}/cli", towerAccessToken=service.token
    )
    answer = cli.submit(body)
    assert re.fullmatch(r"mr-\w+", answer["buildId"])
    assert answer["targetImage"] == answer["containerImage"] == f"{place}/cli/acme/tools:v1"
    assert (answer["mirror"], answer["freeze"], answer["cached"]) == (True, False, False)
    assert not {"containerToken", "expiration", "succeeded"} & answer.keys()
    ended = cli.await_(answer)
    assert ended is not None
    assert (ended["succeeded"], ended["mirrorId"]) == (True, answer["buildId"])
    assert "buildId" not in ended
    assert service.wave.pull(answer["targetImage"]).digest == TOOLS.digest
    again = cli.submit(body)
    assert (again["cached"], again["succeeded"]) == (True, True)


def test_nextflow_awaits_a_mirror(service: Service, place: str) -> None:
    """The config of nulls that goes with each of its requests is none."""
    run = Nextflow(service.address, service.token, pause_s=0.05)
    asked = {"containerImage": "ubuntu:24.04", "mirror": True, "buildRepository": f"{place}/nf"}
    for config in (nextflow.config(), nextflow.config(layers=[])):
        answer = run.submit(**asked, containerConfig=config)
        run.await_(answer)
        assert answer["targetImage"] == f"{place}/nf/library/ubuntu:24.04"
    service.wave.pull(answer["targetImage"])


def test_a_mirror_that_fails(service: Service) -> None:
    run = Nextflow(service.address, service.token, pause_s=0.05)
    answer = run.submit(containerImage="ubuntu", mirror=True, buildRepository="quay.io/acme/nowhere")
    with pytest.raises(nextflow.Failed) as caught:
        run.await_(answer)
    shown = str(caught.value)
    assert "\n- Reason: Container mirror did not complete successfully\n- Find out more here: http://" in shown
    assert shown.endswith(f"/view/mirrors/{answer['buildId']}")
    assert "text/html" in (page_type(service, shown.rpartition(" ")[2]) or "")


def test_a_build_that_fails_has_a_page(service: Service) -> None:
    cli = WaveCli(service.address, pause_s=0.05)
    answer = cli.submit(submission(containerFile="RlJPTSBwYWdlCg=="))
    with pytest.raises(Failed) as caught:
        cli.await_(answer)
    assert "text/html" in (page_type(service, str(caught.value).rpartition(" ")[2]) or "")
    request = f"http://localhost:{service.wave.port}/view/containers/{answer['requestId']}"
    assert "text/html" in (page_type(service, request) or "")


def page_type(service: Service, url: str) -> str | None:
    """The content type of a page whose address was printed; it has to be there."""
    host, _, path = url.removeprefix("http://").partition("/")
    assert host == f"localhost:{service.wave.port}"
    with Connection(service.address) as connection:
        answer = connection.ask("GET", f"/{path}", headers(service.address))
    assert answer.status == 200, f"{url}: {answer.status}"
    return answer.header("Content-Type")


# --- scans -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scanning(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WaveProxy]:
    """A server whose scanner finds the same in every image: one CVE that is low, one that is critical."""
    folder: Path = tmp_path_factory.mktemp("scanning")
    with Upstream() as registry:
        add_images(registry)
        config = f'[scan]\nprogram = "{write_program(folder / "bin").path}"\ncache = "{folder}/cache"\n'
        config += f'[build]\nengine = "none"\n[registries."docker.io"]\nendpoint = "{registry.url}"\n'
        with WaveProxy(folder / "wave", config=config, upstreams=[registry.address]) as wave:
            yield wave


def test_the_command_line_awaits_a_scan(scanning: WaveProxy) -> None:
    cli = WaveCli(scanning.address, pause_s=0.05)
    answer = cli.submit(submission(containerImage="ubuntu", scanMode="required", scanLevels=["LOW", "MEDIUM"]))
    assert re.fullmatch(r"sc-[0-9a-f]{16}_1", answer["scanId"])
    assert "succeeded" not in answer
    with pytest.raises(Failed) as caught:
        cli.await_(answer)
    words = "Container security scan operation found one or more vulnerabilities with severity: CRITICAL"
    details = f"http://localhost:{scanning.port}/view/scans/{answer['scanId']}"
    assert str(caught.value).splitlines()[1:] == [f"- Reason: {words}", f"- Find out more here: {details}"]
    found = cli.get(f"{V2}/{answer['requestId']}/status").document()
    assert {name: int(count) for name, count in found["vulnerabilities"].items()} == {"LOW": 1, "CRITICAL": 1}
    assert json.loads(cli.get(f"/v1alpha1/scans/{answer['scanId']}").body)["status"] == "SUCCEEDED"


def test_vulnerabilities_that_are_allowed(scanning: WaveProxy) -> None:
    cli = WaveCli(scanning.address, pause_s=0.05)
    levels = ["LOW", "MEDIUM", "HIGH", "CRITICAL"]
    ended = cli.await_(cli.submit(submission(containerImage="ubuntu", scanMode="required", scanLevels=levels)))
    assert ended is not None
    assert ended["succeeded"] is True
    assert ended["reason"].endswith("compatible with requested security levels: LOW,MEDIUM,HIGH,CRITICAL")


def test_nobody_waits_for_an_asynchronous_scan(scanning: WaveProxy) -> None:
    cli = WaveCli(scanning.address, pause_s=0.05)
    answer = cli.submit(submission(containerImage="alpine", scanMode="async"))
    assert answer["scanId"]
    found = read_status(cli.get(f"{V2}/{answer['requestId']}/status"))
    assert (found["status"], found["succeeded"]) == ("DONE", True)


def test_nextflow_awaits_a_scan(scanning: WaveProxy) -> None:
    run = Nextflow(scanning.address, pause_s=0.05)
    answer = run.submit(containerImage="ubuntu", scanMode="required", scanLevels=["LOW"])
    assert answer["scanId"]
    with pytest.raises(nextflow.Failed, match="vulnerabilities with severity: CRITICAL"):
        run.await_(answer)
    answer = run.submit(containerImage="ubuntu", scanMode="required", scanLevels=["LOW", "CRITICAL"])
    run.await_(answer)

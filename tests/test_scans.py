"""Scans through the whole program: requested, run by its builder, and what the status says then.

The scanner is one of the tests' own, and the real trivy where that is installed, with a database of planted advisories.
"""

import json
import os
import signal
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.images import Image, Layer, busybox_image, digest_of, image, layer
from bench.upstream import Upstream
from builder.child import find_program
from tests.advisories import write_database
from tests.building.works import builder_pids, why_no_builds
from tests.patience import until
from tests.scanner_program import is_alive, write_program
from tests.servers import WaveProxy

PACKAGE = """Package: planted
Status: install ok installed
Version: 1.0-1
Architecture: amd64
Maintainer: Nobody <nobody@planted.test>
Description: a package with a hole

"""
DEBIAN = image(
    [
        layer(
            {
                "etc/os-release": 'ID=debian\nVERSION_ID="12"\nNAME="Debian GNU/Linux"\n',
                "etc/debian_version": "12.5\n",
                "var/lib/dpkg/status": PACKAGE,
            }
        )
    ]
)
EMPTY = image([layer({"nothing": ""})])
BAD = "Container security scan operation found one or more vulnerabilities with severity: CRITICAL"

needs_trivy = pytest.mark.skipif(
    find_program("trivy") is None, reason="trivy is not installed: put the program into PATH to scan with it"
)


def configuration(program: str, cache: Path) -> str:
    return f'[scan]\nprogram = "{program}"\ncache = "{cache}"\noffline = true\n[build]\nengine = "none"\n'


def done(wave: WaveProxy, answer: dict[str, Any]) -> dict[str, Any]:
    """The request's status when that is decided."""

    def decided() -> dict[str, Any] | None:
        status: dict[str, Any] = wave.request("GET", f"/v1alpha2/container/{answer['requestId']}/status").json()
        assert status["status"] in ("PENDING", "BUILDING", "SCANNING", "DONE")
        return status if status["status"] == "DONE" else None

    return until(decided, lambda: wave.stderr)


def submit(wave: WaveProxy, **attributes: Any) -> dict[str, Any]:
    answer: dict[str, Any] = wave.request("POST", "/v1alpha2/container", body=attributes).json()
    return answer


def check_scan(wave: WaveProxy, upstream: Upstream) -> None:
    """An image with a hole, one without, and what is told of both."""
    upstream.add("library/debian", DEBIAN, "12")
    upstream.add("library/empty", EMPTY, "1")
    name = f"{upstream.address}/library/debian:12"
    refused = done(wave, answer := submit(wave, containerImage=name, scanMode="required"))
    assert refused["succeeded"] is False
    assert refused["reason"] == BAD
    assert refused["vulnerabilities"] == {"CRITICAL": 1}
    allowed = done(wave, submit(wave, containerImage=name, scanMode="required", scanLevels=["CRITICAL"]))
    assert (allowed["succeeded"], allowed["scanId"]) == (True, answer["scanId"])
    clean = submit(wave, containerImage=f"{upstream.address}/library/empty:1", scanMode="required")
    assert done(wave, clean).items() >= {"succeeded": True}.items()
    assert "vulnerabilities" not in done(wave, clean)
    scan = wave.request("GET", f"/v1alpha1/scans/{answer['scanId']}").json()
    assert (scan["status"], scan["containerImage"]) == ("SUCCEEDED", name)
    assert [found["id"] for found in scan["vulnerabilities"]] == ["CVE-2099-0001"]
    assert scan["vulnerabilities"][0].items() >= {"pkgName": "planted", "installedVersion": "1.0-1"}.items()
    assert scan["vulnerabilities"][0]["fixedVersion"] == "2.0"
    log = wave.request("GET", f"/v1alpha1/scans/{answer['scanId']}/logs")
    assert b">> vulnerabilities: 1 critical\n" in log.body
    spdx = wave.request("GET", f"/v1alpha1/scans/{answer['scanId']}/spdx").json()
    assert spdx["spdxVersion"].startswith("SPDX-2.")
    assert answer["requestId"] not in str(scan) + log.body.decode() + str(spdx)


def test_scans_by_a_program_of_the_tests(
    upstream: Callable[..., Upstream], wave: Callable[..., WaveProxy], tmp_path: Path
) -> None:
    found = '[{"VulnerabilityID": "CVE-2099-0001", "Severity": "CRITICAL", "PkgName": "planted",'
    found += '"InstalledVersion": "1.0-1", "FixedVersion": "2.0"}]'
    report = f'{{"SchemaVersion": 2, "Results": [{{"Vulnerabilities": {found}}}]}}'
    image = f"write({report!r} if 'debian' in ' '.join(argv) else '{{\"SchemaVersion\": 2}}')"
    program = write_program(tmp_path / "bin", image=image)
    write_database(tmp_path / "cache", "debian 12", {})
    registry = upstream()
    config = configuration(str(program.path), tmp_path / "cache")
    check_scan(wave(upstreams=[registry.address], config=config), registry)


@needs_trivy
def test_scans_by_trivy(upstream: Callable[..., Upstream], wave: Callable[..., WaveProxy], tmp_path: Path) -> None:
    write_database(tmp_path / "cache", "debian 12", {"planted": {"CVE-2099-0001": "2.0"}})
    registry = upstream()
    config = configuration("trivy", tmp_path / "cache")
    check_scan(wave(upstreams=[registry.address], config=config), registry)


@needs_trivy
def test_trivy_without_a_database(
    upstream: Callable[..., Upstream], wave: Callable[..., WaveProxy], tmp_path: Path
) -> None:
    registry = upstream()
    registry.add("library/debian", DEBIAN, "12")
    started = wave(upstreams=[registry.address], config=configuration("trivy", tmp_path / "cache"))
    name = f"{registry.address}/library/debian:12"
    refused = done(started, answer := submit(started, containerImage=name, scanMode="required"))
    assert refused["reason"] == "Container security scan did not complete successfully"
    scan = started.request("GET", f"/v1alpha1/scans/{answer['scanId']}").json()
    assert scan["status"] == "FAILED"
    assert scan["reason"].startswith("no vulnerability database")


@needs_trivy
def test_trivy_fetches_its_database_from_a_mirror(
    upstream: Callable[..., Upstream], wave: Callable[..., WaveProxy], tmp_path: Path
) -> None:
    write_database(tmp_path / "made", "debian 12", {"planted": {"CVE-2099-0001": "2.0"}})
    registry = upstream()
    registry.add("mirror/trivy-db", database_image(tmp_path / "made" / "db"), "2")
    arguments = f'arguments = ["--db-repository", "{registry.address}/mirror/trivy-db:2"]\n'
    scan = f'[scan]\nprogram = "trivy"\n{arguments}[build]\nengine = "none"\n'
    check_scan(wave(upstreams=[registry.address], config=scan), registry)
    assert len([request for request in registry.log if "/mirror/trivy-db/blobs/" in request.path]) <= 2


@pytest.mark.skipif(bool(why_no_builds()), reason=why_no_builds() or "builds can run here")
def test_a_build_is_scanned_where_it_was_pushed_to(
    upstream: Callable[..., Upstream], wave: Callable[..., WaveProxy], tmp_path: Path
) -> None:
    report = '{"SchemaVersion": 2, "Results": [{"Vulnerabilities": [{"VulnerabilityID": "CVE-1", "Severity": "LOW"}]}]}'
    program = write_program(tmp_path / "bin", image=f"write({report!r})")
    write_database(tmp_path / "cache", "debian 12", {})
    registry = upstream()
    registry.add("library/busybox", busybox_image(), "1")
    config = f'[scan]\nprogram = "{program.path}"\ncache = "{tmp_path / "cache"}"\noffline = true\n'
    port = wave(upstreams=[registry.address], config=config)
    file = b64encode(f"FROM {registry.address}/library/busybox:1\nRUN echo built >/built\n".encode()).decode()
    answer = submit(port, containerFile=file, scanMode="required", scanLevels=["LOW"])
    assert "succeeded" not in answer
    found = done(port, answer)
    assert found["succeeded"] is True, port.stderr
    assert found["vulnerabilities"] == {"LOW": 1}
    assert found.items() >= {"buildId": answer["buildId"], "scanId": answer["scanId"]}.items()
    scan = port.request("GET", f"/v1alpha1/scans/{answer['scanId']}").json()
    assert (scan["buildId"], scan["containerImage"]) == (answer["buildId"], answer["containerImage"])
    assert ">> image sha256:" in scan["logs"]
    page = port.request("GET", found["detailsUri"].removeprefix(port.url.replace("127.0.0.1", "localhost")))
    assert page.status == 200
    assert b"CVE-1" in page.body


@pytest.mark.skipif(find_program("setpriv") is None, reason="setpriv (util-linux) is not installed")
def test_a_scan_whose_builder_is_killed_is_done_by_the_next(
    upstream: Callable[..., Upstream], wave: Callable[..., WaveProxy], tmp_path: Path
) -> None:
    began = tmp_path / "began"
    first = f"open({str(began)!r}, 'w').close(); time.sleep(600)"
    image = f"exec({first!r}) if not os.path.exists({str(began)!r}) else write('{{\"SchemaVersion\": 2}}')"
    program = write_program(tmp_path / "bin", image=image)
    write_database(tmp_path / "cache", "debian 12", {})
    registry = upstream()
    registry.add("library/empty", EMPTY, "1")
    port = wave(upstreams=[registry.address], config=configuration(str(program.path), tmp_path / "cache"))
    answer = submit(port, containerImage=f"{registry.address}/library/empty:1", scanMode="required")
    until(began.exists, lambda: port.stderr)
    (builder,) = builder_pids(port)
    os.kill(builder, signal.SIGKILL)
    assert done(port, answer)["succeeded"] is True, port.stderr
    assert not is_alive(program.calls[0]["pid"])
    assert list((tmp_path / "wave-0" / "builds").iterdir()) == []


def database_image(folder: Path) -> Image:
    """A vulnerability database as registries have it: one layer with its files."""
    content = layer({file.name: file.read_bytes() for file in folder.iterdir()})
    blob = Layer(content.digest, content.content, "application/vnd.aquasec.trivy.db.layer.v1.tar+gzip", content.diff_id)
    made = image([blob])
    document = json.loads(made.manifest)
    document["layers"][0]["annotations"] = {"org.opencontainers.image.title": "db.tar.gz"}
    manifest = json.dumps(document).encode()
    return Image(digest_of(manifest), made.media_type, manifest, made.blobs)


def test_what_is_missing_is_said_at_the_start(
    upstream: Callable[..., Upstream], wave: Callable[..., WaveProxy], tmp_path: Path
) -> None:
    registry = upstream()
    registry.add("library/debian", DEBIAN, "12")
    started = wave(upstreams=[registry.address], config=configuration("no-such-scanner", tmp_path / "cache"))
    name = f"{registry.address}/library/debian:12"
    answer = submit(started, containerImage=name, scanMode="required")
    assert done(started, answer)["succeeded"] is False
    scan = started.request("GET", f"/v1alpha1/scans/{answer['scanId']}").json()
    assert scan["reason"].endswith("the program no-such-scanner is not installed, see [scan] program")
    assert "scans can't be run here" in started.stderr

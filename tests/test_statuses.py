"""How far a container request is: every state of its build, its mirror and its scan (``wave.md`` §1.6, V36)."""

from dataclasses import replace
from typing import Any

import orjson
import pytest

from api.jobs.statuses import container_status
from wave_proxy.image.build import BuildRecord, BuildSpec, Kind, Phase
from wave_proxy.image.request import ContainerRequest
from wave_proxy.image.scan import Scan, Vulnerability, count_severities, worst_first
from wave_proxy.state.tokens import TokenRecord

URL = "https://wave.example"
TOKEN = "0123456789abcdef" * 2
CREATED = 1_764_000_000.25
CREATED_TEXT = "2025-11-24T16:00:00.250000Z"
BUILD_FAILED = "Container build did not complete successfully"
FOUND = "Container security scan operation found one or more vulnerabilities"
IDS: dict[Kind, str] = {
    "build": "bd-aaaaaaaaaaaaaaaa_1",
    "mirror": "mr-bbbbbbbbbbbbbbbb_1",
    "scan": "sc-cccccccccccccccc_1",
}


def job(kind: Kind = "build", phase: Phase = "done", *, took_s: float = 60.0, exit_status: int = 0) -> BuildRecord:
    """A job that was asked for at CREATED and, if it is done, took that long."""
    is_done = phase == "done"
    return BuildRecord(
        IDS[kind],
        BuildSpec("a" * 16, "registry.test/tool:1", "", kind=kind),
        phase,
        created=CREATED,
        finished=CREATED + took_s if is_done else 0.0,
        exit_status=exit_status if is_done else None,
    )


def scan(counts: dict[str, int] | None = None, **changes: Any) -> Scan:
    """A scan that found so many vulnerabilities in two minutes."""
    return Scan(job("scan", **{"took_s": 120.0, **changes}), counts or {})


def status(
    made: BuildRecord | None, found: Scan | None = None, *, levels: tuple[str, ...] = (), **members: Any
) -> dict[str, Any]:
    """The answer as a client reads it, half a minute after the request."""
    request = ContainerRequest(
        image="registry.test/tool:1",
        build_id=made.build_id if made else "",
        scan_ids=(found.record.build_id,) if found else (),
        scan_mode="required" if found else "",
        scan_levels=levels,
        created=CREATED,
        expires=CREATED + 3600,
    )
    record = TokenRecord(TOKEN, replace(request, **members), "", "", False)
    answer: dict[str, Any] = orjson.loads(
        orjson.dumps(container_status(record, made, [found] if found else [], now=CREATED + 30, public_url=URL))
    )
    assert answer.pop("id") == TOKEN
    assert answer.pop("creationTime") == CREATED_TEXT
    return answer


BUILD, MIRROR, SCAN = ({"buildId": IDS["build"]}, {"mirrorId": IDS["mirror"]}, {"scanId": IDS["scan"]})
BUILD_DETAILS = {"detailsUri": f"{URL}/view/builds/{IDS['build']}"}
SCAN_DETAILS = {"detailsUri": f"{URL}/view/scans/{IDS['scan']}"}


@pytest.mark.parametrize(
    ("made", "found", "levels", "answer"),
    [
        pytest.param(None, None, (), {"status": "DONE", "duration": 30.0, "succeeded": True}, id="nothing to do"),
        pytest.param(job(phase="queued"), None, (), {"status": "PENDING", **BUILD}, id="build waits"),
        pytest.param(job(phase="running"), None, (), {"status": "BUILDING", **BUILD}, id="build runs"),
        pytest.param(
            job(), None, (), {"status": "DONE", **BUILD, "duration": 60.0, "succeeded": True}, id="build is done"
        ),
        pytest.param(
            job(exit_status=1),
            None,
            (),
            {"status": "DONE", **BUILD, "duration": 60.0, "succeeded": False, "reason": BUILD_FAILED, **BUILD_DETAILS},
            id="build failed",
        ),
        pytest.param(
            job(exit_status=1),
            scan(phase="queued"),
            (),
            {
                "status": "DONE",
                **BUILD,
                **SCAN,
                "duration": 60.0,
                "succeeded": False,
                "reason": BUILD_FAILED,
                **BUILD_DETAILS,
            },
            id="build failed, scan required",
        ),
        pytest.param(
            job(phase="running"),
            scan(phase="queued"),
            (),
            {"status": "BUILDING", **BUILD, **SCAN},
            id="build runs, scan required",
        ),
        pytest.param(job(), scan(phase="queued"), (), {"status": "SCANNING", **BUILD, **SCAN}, id="scan waits"),
        pytest.param(job(), scan(phase="running"), (), {"status": "SCANNING", **BUILD, **SCAN}, id="scan runs"),
        pytest.param(
            job(), scan(), (), {"status": "DONE", **BUILD, **SCAN, "duration": 180.0, "succeeded": True}, id="clean"
        ),
        pytest.param(
            job(),
            scan({"MEDIUM": 5, "HIGH": 2, "CRITICAL": 1}),
            ("LOW", "MEDIUM"),
            {
                "status": "DONE",
                **BUILD,
                **SCAN,
                "duration": 180.0,
                "vulnerabilities": {"MEDIUM": 5, "HIGH": 2, "CRITICAL": 1},
                "succeeded": False,
                "reason": f"{FOUND} with severity: HIGH,CRITICAL",
                **SCAN_DETAILS,
            },
            id="worse than allowed",
        ),
        pytest.param(
            job(),
            scan({"MEDIUM": 5}),
            ("LOW", "MEDIUM"),
            {
                "status": "DONE",
                **BUILD,
                **SCAN,
                "duration": 180.0,
                "vulnerabilities": {"MEDIUM": 5},
                "succeeded": True,
                "reason": f"{FOUND} that are compatible with requested security levels: LOW,MEDIUM",
                **SCAN_DETAILS,
            },
            id="allowed",
        ),
        pytest.param(
            job(),
            scan({"MEDIUM": 5}),
            (),
            {
                "status": "DONE",
                **BUILD,
                **SCAN,
                "duration": 180.0,
                "vulnerabilities": {"MEDIUM": 5},
                "succeeded": False,
                "reason": f"{FOUND} with severity: MEDIUM",
                **SCAN_DETAILS,
            },
            id="nothing is allowed",
        ),
        pytest.param(
            job(),
            scan(exit_status=124),
            ("LOW", "MEDIUM", "HIGH", "CRITICAL"),
            {
                "status": "DONE",
                **BUILD,
                **SCAN,
                "duration": 180.0,
                "succeeded": False,
                "reason": "Container security scan did not complete successfully",
                **SCAN_DETAILS,
            },
            id="scan failed",
        ),
        pytest.param(
            None, scan(), (), {"status": "DONE", **SCAN, "duration": 120.0, "succeeded": True}, id="scan alone"
        ),
        pytest.param(job("mirror", "running"), None, (), {"status": "BUILDING", **MIRROR}, id="mirror runs"),
        pytest.param(
            job("mirror", exit_status=1),
            None,
            (),
            {
                "status": "DONE",
                **MIRROR,
                "duration": 60.0,
                "succeeded": False,
                "reason": "Container mirror did not complete successfully",
                "detailsUri": f"{URL}/view/mirrors/{IDS['mirror']}",
            },
            id="mirror failed",
        ),
    ],
)
def test_the_status(
    made: BuildRecord | None, found: Scan | None, levels: tuple[str, ...], answer: dict[str, Any]
) -> None:
    assert status(made, found, levels=levels) == answer


def test_a_scan_that_nobody_waits_for_is_named() -> None:
    found = status(job(), scan_ids=(IDS["scan"],), scan_mode="async")
    assert found == {"status": "DONE", **BUILD, **SCAN, "duration": 60.0, "succeeded": True}


@pytest.mark.parametrize(("took_s", "text"), [(0.0, b"0.000000000"), (1e-5, b"0.000010000"), (12.0, b"12.000000000")])
def test_a_duration_is_written_out_with_a_point(took_s: float, text: bytes) -> None:
    request = ContainerRequest(image="registry.test/tool:1", created=0.0)
    record = TokenRecord(TOKEN, request, "", "", False)
    answer = container_status(record, replace(job(), created=0.0, finished=took_s), (), now=0.0, public_url=URL)
    assert b'"duration":%b,' % text in orjson.dumps(answer)


def test_vulnerabilities_are_counted_and_the_worst_come_first() -> None:
    found = [Vulnerability("1", "LOW"), Vulnerability("2", "CRITICAL"), Vulnerability("3", "LOW")]
    assert list(count_severities(found).items()) == [("LOW", 2), ("CRITICAL", 1)]
    assert [one.id for one in worst_first(found)] == ["2", "1", "3"]


@pytest.mark.parametrize(
    ("scans", "answer"),
    [
        pytest.param((scan(), scan(phase="running")), {"status": "SCANNING"}, id="one goes on"),
        pytest.param((scan(took_s=9.0), scan()), {"status": "DONE", "duration": 180.0, "succeeded": True}, id="clean"),
        pytest.param(
            (scan({"LOW": 1}), scan({"HIGH": 1}), scan({"CRITICAL": 1})),
            {
                "status": "DONE",
                "duration": 180.0,
                "vulnerabilities": {"HIGH": 1},
                "succeeded": False,
                "reason": f"{FOUND} with severity: HIGH",
                **SCAN_DETAILS,
            },
            id="the first that fails is told",
        ),
        pytest.param(
            (scan(), scan({"LOW": 2})),
            {
                "status": "DONE",
                "duration": 180.0,
                "vulnerabilities": {"LOW": 2},
                "succeeded": True,
                "reason": f"{FOUND} that are compatible with requested security levels: LOW",
                **SCAN_DETAILS,
            },
            id="else the last one",
        ),
    ],
)
def test_an_image_of_several_platforms_waits_for_all_scans(scans: tuple[Scan, ...], answer: dict[str, Any]) -> None:
    request = ContainerRequest(
        image="registry.test/tool:1",
        build_id=IDS["build"],
        scan_ids=(IDS["scan"], "sc-dddddddddddddddd_1"),
        scan_levels=("LOW",),
        created=CREATED,
    )
    found = container_status(TokenRecord(TOKEN, request, "", "", False), job(), scans, now=CREATED, public_url=URL)
    told = orjson.loads(orjson.dumps(found))
    assert told == {"id": TOKEN, "creationTime": CREATED_TEXT, **BUILD, **SCAN, **answer}

"""Reports of the scanner: what is read out of them, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from builder.failures import BuildFailed
from builder.findings import read_findings
from tests.scanner_program import REPORT
from wave_proxy.image.scan import Vulnerability


def read(folder: Path, document: Any) -> list[Vulnerability]:
    file = folder / "report.json"
    file.write_text(document if isinstance(document, str) else json.dumps(document))
    return read_findings(file)


def test_what_is_read(tmp_path: Path) -> None:
    assert read(tmp_path, REPORT) == [
        Vulnerability("CVE-1", "LOW", "", "zlib", "1", "", ""),
        Vulnerability("CVE-2", "CRITICAL", "Bad", "openssl", "1.0", "1.1", "https://cve.test/2"),
    ]


@pytest.mark.parametrize(
    "document",
    [{"SchemaVersion": 2}, {"SchemaVersion": 2, "Results": None}, {"SchemaVersion": 2, "Results": []}],
    ids=["no results", "null", "empty"],
)
def test_nothing_is_found(tmp_path: Path, document: Any) -> None:
    assert read(tmp_path, document) == []


def test_what_is_not_as_it_should_be_is_left_out(tmp_path: Path) -> None:
    entries = [None, "x", {"VulnerabilityID": 7, "Severity": "WORSE", "Title": "t" * 900}, {"Severity": ["HIGH"]}]
    results: list[Any] = [None, [], {"Vulnerabilities": "x"}, {"Vulnerabilities": entries}]
    found = read(tmp_path, {"SchemaVersion": 2, "Results": results})
    assert found == [Vulnerability("", "UNKNOWN", "t" * 500), Vulnerability("", "UNKNOWN")]


def test_the_same_in_two_places_is_two(tmp_path: Path) -> None:
    twice = {"SchemaVersion": 2, "Results": [{"Vulnerabilities": [{"VulnerabilityID": "CVE-1"}] * 2}]}
    assert len(read(tmp_path, twice)) == 2


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("", "the scanner's report is not JSON: "),
        ('{"SchemaVersion": 2, "Res', "the scanner's report is not JSON: "),
        ("[]", "the scanner's report is not a JSON object"),
        ({"Results": []}, "the scanner's report has another form: "),
        ({"SchemaVersion": 2, "Results": {}}, "the scanner's report has another form: "),
        ("[" * 100_000, "the scanner's report is not JSON: "),
    ],
    ids=["empty", "cut off", "array", "no version", "results are none", "deep"],
)
def test_what_is_no_report(tmp_path: Path, document: Any, message: str) -> None:
    with pytest.raises(BuildFailed) as caught:
        read(tmp_path, document)
    assert str(caught.value).startswith(message)


def test_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(BuildFailed) as caught:
        read_findings(tmp_path / "report.json")
    assert str(caught.value).endswith("No such file: report.json")


def test_one_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builder.findings.MAX_REPORT_BYTES", 10)
    with pytest.raises(BuildFailed) as caught:
        read(tmp_path, REPORT)
    assert "and may have 10" in str(caught.value)

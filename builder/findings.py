"""What trivy has found, read out of its JSON with care: the image that it looked at may have had a hand in it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast, get_args

import orjson

from builder.failures import BuildFailed
from wave_proxy.image.scan import Severity, Vulnerability

MAX_REPORT_BYTES = 64 << 20
_MAX_TEXT_CHARS = 500
_SEVERITIES = frozenset(get_args(Severity))


def read_findings(report: Path) -> list[Vulnerability]:
    """All vulnerabilities of a report, in its order. Reads the disk. Raises BuildFailed when it is none.

    Source: ``wave.md`` §6.11.
    """
    document = read_document(report, "report")
    results = document.get("Results", [])
    if not isinstance(document.get("SchemaVersion"), int) or not isinstance(results, list | None):
        raise BuildFailed("the scanner's report has another form: this version does not know it")
    return [_vulnerability(entry) for result in results or [] for entry in _entries(result)]


def read_document(file: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file that the scanner has written. Raises BuildFailed."""
    try:
        size = file.stat().st_size
        content = file.read_bytes() if size <= MAX_REPORT_BYTES else b""
    except OSError:
        raise BuildFailed(f"the scanner has ended well, and left no {what}: No such file: {file.name}") from None
    if size > MAX_REPORT_BYTES:
        raise BuildFailed(f"the scanner's {what} has {size} bytes, and may have {MAX_REPORT_BYTES}")
    try:
        document = orjson.loads(content)
    except orjson.JSONDecodeError as err:
        raise BuildFailed(f"the scanner's {what} is not JSON: {err}") from None
    if not isinstance(document, dict):
        raise BuildFailed(f"the scanner's {what} is not a JSON object")
    return document


def _entries(result: Any) -> Iterator[dict[str, Any]]:
    listed = result.get("Vulnerabilities") if isinstance(result, dict) else None
    for entry in listed if isinstance(listed, list) else ():
        if isinstance(entry, dict):
            yield entry


def _vulnerability(entry: dict[str, Any]) -> Vulnerability:
    def text(name: str) -> str:
        value = entry.get(name)
        return value[:_MAX_TEXT_CHARS] if isinstance(value, str) else ""

    severity = text("Severity")
    return Vulnerability(
        id=text("VulnerabilityID"),
        severity=cast(Severity, severity) if severity in _SEVERITIES else "UNKNOWN",
        title=text("Title"),
        package=text("PkgName"),
        installed=text("InstalledVersion"),
        fixed=text("FixedVersion"),
        url=text("PrimaryURL"),
    )

"""What a security scan finds: vulnerabilities, how severe they are, and what that means for who asked."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from wave_proxy.image.build import BuildRecord

ScanMode = Literal["", "async", "required"]
Severity = Literal["UNKNOWN", "LOW", "MEDIUM", "HIGH", "CRITICAL"]

SEVERITIES: tuple[Severity, ...] = get_args(Severity)  # the worst one last


@dataclass(frozen=True, slots=True)
class Vulnerability:
    """One advisory about one package of an image. What is not known is empty."""

    id: str
    severity: Severity
    title: str = ""
    package: str = ""
    installed: str = ""
    fixed: str = ""
    url: str = ""


@dataclass(frozen=True, slots=True)
class Scan:
    """A scan as it stands: its job's record, and once it has succeeded how many vulnerabilities have each severity.

    The severities that were found are in the order of ``SEVERITIES``.
    """

    record: BuildRecord
    counts: Mapping[str, int]


def worst_first(found: Iterable[Vulnerability]) -> list[Vulnerability]:
    """The vulnerabilities by their severity; equal ones stay in their order."""
    return sorted(found, key=lambda one: -SEVERITIES.index(one.severity))


def count_severities(found: Iterable[Vulnerability]) -> dict[str, int]:
    """How many vulnerabilities have each severity, the worst one last; without those that none has."""
    counts = Counter(one.severity for one in found)
    return {severity: counts[severity] for severity in SEVERITIES if counts[severity]}

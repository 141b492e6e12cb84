"""What one process has counted, as a file for others to read: ``<folder>/<part>.json``, adding up over processes."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, Literal

import orjson

Labels = tuple[tuple[str, str], ...]
Kind = Literal["counter", "gauge", "histogram"]

STALE_S = 10.0


@dataclass(frozen=True, slots=True)
class Family:
    """Samples of one name. Each is a list of numbers.

    Of a counter it is the count; of a histogram each bucket's own count, the last one without end (``bounds`` are those
    of the others), and then the sum of the values. Over processes both add up. Of a gauge it ends in the value, and the
    greater list holds: [value] is a maximum, [instant, value] the latest.
    """

    name: str
    kind: Kind
    help: str
    samples: dict[Labels, list[float]]
    bounds: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A process's families at an instant, which is seconds on the machine's monotonic clock."""

    part: str
    pid: int
    at: float
    families: tuple[Family, ...]

    def is_current(self) -> bool:
        """Whether the process still runs, and has written lately."""
        if monotonic() - self.at > STALE_S:
            return False
        try:
            os.kill(self.pid, 0)
        except OSError:
            return False
        return True


def add(families: Iterable[Family]) -> list[Family]:
    """One family a name, with its samples of all processes together."""
    totals: dict[str, Family] = {}
    for family in families:
        total = totals.get(family.name)
        if total is None or total.bounds != family.bounds:
            total = totals[family.name] = Family(family.name, family.kind, family.help, {}, family.bounds)
        for labels, numbers in family.samples.items():
            known = total.samples.get(labels)
            total.samples[labels] = numbers if known is None else _together(family.kind, known, numbers)
    return list(totals.values())


def _together(kind: Kind, one: list[float], other: list[float]) -> list[float]:
    return max(one, other) if kind == "gauge" else [a + b for a, b in zip(one, other, strict=True)]


def counts(families: Iterable[Family]) -> list[Family]:
    """What outlives a process: all but the gauges."""
    return [family for family in families if family.kind != "gauge"]


def path_of(folder: Path, part: str) -> Path:
    """Where a part's snapshot is."""
    return folder / f"{part}.json"


def write(folder: Path, snapshot: Snapshot) -> None:
    """Put a snapshot in the place of the part's last one; readers see the old or the new. Raises OSError."""
    path = path_of(folder, snapshot.part)
    made = path.with_suffix(".new")
    made.write_bytes(orjson.dumps(_to_document(snapshot)))
    made.replace(path)


def read(path: Path) -> Snapshot | None:
    """The snapshot in a file; None when there is none that can be read."""
    try:
        return _from_document(orjson.loads(path.read_bytes()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _to_document(snapshot: Snapshot) -> dict[str, Any]:
    families = [
        {
            "name": family.name,
            "kind": family.kind,
            "help": family.help,
            "bounds": family.bounds,
            "samples": [[dict(labels), numbers] for labels, numbers in family.samples.items()],
        }
        for family in snapshot.families
    ]
    return {"part": snapshot.part, "pid": snapshot.pid, "at": snapshot.at, "families": families}


def _from_document(document: Any) -> Snapshot:
    families = tuple(
        Family(
            entry["name"],
            entry["kind"],
            entry["help"],
            {tuple(labels.items()): [float(number) for number in numbers] for labels, numbers in entry["samples"]},
            tuple(entry["bounds"]),
        )
        for entry in document["families"]
    )
    return Snapshot(document["part"], int(document["pid"]), float(document["at"]), families)

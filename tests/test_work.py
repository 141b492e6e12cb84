"""Jobs of several kinds, each done by its own."""

from dataclasses import dataclass, field

from builder.logbook import LogBook
from builder.work import Confirm, Works
from wave_proxy.image.build import BuildRecord, BuildSpec, Kind


@dataclass
class Noted:
    """Work that is done at once; ``digest`` is what it brings, ``done`` the ids of its jobs."""

    digest: str
    done: list[str] = field(default_factory=list)

    async def run(self, record: BuildRecord, book: LogBook, confirm: Confirm) -> str:
        await confirm()
        self.done.append(record.build_id)
        return self.digest


def record(kind: Kind) -> BuildRecord:
    return BuildRecord(f"{kind}-1", BuildSpec("1" * 16, "a.test/b:1", "", kind=kind), "running", 1.0)


async def nothing(_: bytes) -> None:
    """A log that nobody keeps."""


async def ours() -> None:
    """The job is ours."""


async def test_each_kind_has_its_own() -> None:
    builds, scans = Noted("sha256:b"), Noted("sha256:s")
    works = Works({"build": builds, "scan": scans})
    assert await works.run(record("scan"), LogBook(nothing), ours) == "sha256:s"
    assert await works.run(record("build"), LogBook(nothing), ours) == "sha256:b"
    assert (builds.done, scans.done) == (["build-1"], ["scan-1"])


def test_a_builder_may_do_some_kinds_only() -> None:
    works = Works({"mirror": Noted("sha256:m")})
    assert [works.does(kind) for kind in ("build", "mirror", "scan", "later")] == [False, True, False, False]

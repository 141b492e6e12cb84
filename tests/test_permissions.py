"""Which repositories a login opens: asked again in time, ended by a refusal, gone on with when nobody answers."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from time import time

import pytest

from tests.cached import files_in
from tests.patience import eventually
from wave_proxy.cache import permissions
from wave_proxy.cache.permissions import Permissions
from wave_proxy.errors import Denied, HostUnknown, ManifestUnknown, TooManyRequests, UpstreamUnavailable, WaveError

NAME = "0123456789abcdef@quay.io/acme/x"
REFUSALS = [Denied("no"), ManifestUnknown("no")]
UNANSWERED = [UpstreamUnavailable("away"), TooManyRequests("later"), HostUnknown("where")]


class Upstream:
    """What upstream says, and how often it was asked."""

    def __init__(self) -> None:
        self.error: WaveError | None = None
        self.asked = 0
        self.held: asyncio.Event | None = None
        self.now: Callable[[], float] = time

    async def __call__(self) -> float:
        self.asked += 1
        if self.held is not None:
            await self.held.wait()
        if self.error is not None:
            raise self.error
        return self.now()


@pytest.fixture
def upstream() -> Upstream:
    return Upstream()


async def test_one_question_for_all_and_then_none(tmp_path: Path, upstream: Upstream) -> None:
    known = Permissions(tmp_path, 60)
    await asyncio.gather(*(known.ensure(NAME, "x", upstream) for _ in range(20)))
    await known.ensure(NAME, "y", upstream)
    assert upstream.asked == 1
    await known.ensure(NAME + "y", "x", upstream)
    assert upstream.asked == 2


async def test_it_is_asked_again_in_time(tmp_path: Path, upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(permissions, "time", lambda: clock[0])
    upstream.now = lambda: clock[0]
    known = Permissions(tmp_path, 60)
    known.confirm(NAME, 1000.0)
    for clock[0], asked in ((1059.0, 0), (1061.0, 1), (1120.0, 1), (1122.0, 2), (500.0, 3)):
        await known.ensure(NAME, "x", upstream)
        assert upstream.asked == asked


@pytest.mark.parametrize("error", REFUSALS, ids=lambda error: type(error).__name__)
async def test_a_refusal_ends_it(tmp_path: Path, upstream: Upstream, error: WaveError) -> None:
    known = Permissions(tmp_path, 0.0)
    await known.ensure(NAME, "x", upstream)
    assert files_in(tmp_path, "permissions")
    upstream.error = error
    with pytest.raises(type(error)):
        await known.ensure(NAME, "x", upstream)
    assert not files_in(tmp_path, "permissions")
    upstream.error = UpstreamUnavailable("away")
    for worker in (known, Permissions(tmp_path, 0.0)):
        with pytest.raises(UpstreamUnavailable):
            await worker.ensure(NAME, "x", upstream)


@pytest.mark.parametrize("error", UNANSWERED, ids=lambda error: type(error).__name__)
async def test_it_goes_on_while_nobody_answers(tmp_path: Path, upstream: Upstream, error: WaveError) -> None:
    known = Permissions(tmp_path, 0.0)
    await known.ensure(NAME, "x", upstream)
    upstream.error = error
    for worker in (known, Permissions(tmp_path, 0.0)):  # the next process knows it too
        for _ in range(3):
            await worker.ensure(NAME, "x", upstream)
    assert upstream.asked == 3  # and upstream is left alone for a while
    with pytest.raises(type(error)):
        await known.ensure("another", "x", upstream)


async def test_a_slow_answer_is_not_waited_for_but_counts(
    tmp_path: Path, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(permissions, "_PATIENCE_S", 0.02)
    monkeypatch.setattr(permissions, "_AGAIN_S", 0.0)
    known = Permissions(tmp_path, 0.0)
    await known.ensure(NAME, "x", upstream)
    upstream.held, upstream.error = asyncio.Event(), Denied("no")
    await known.ensure(NAME, "x", upstream)
    upstream.held.set()
    await eventually(lambda: not files_in(tmp_path, "permissions"))
    with pytest.raises(Denied):
        await known.ensure(NAME, "x", upstream)
    await known.close()


async def test_workers_share_what_they_know(tmp_path: Path, upstream: Upstream) -> None:
    one, other = Permissions(tmp_path, 60), Permissions(tmp_path, 60)
    await one.ensure(NAME, "x", upstream)
    await other.ensure(NAME, "x", upstream)
    assert upstream.asked == 1
    assert other.until(NAME) > one.until(NAME) - 5
    assert NAME not in "".join(files_in(tmp_path, "permissions"))


async def test_what_was_seen_earlier_counts_from_then(
    tmp_path: Path, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(permissions, "time", lambda: 1000.0)
    known = Permissions(tmp_path, 60)
    known.confirm(NAME, 950.0)
    known.confirm(NAME, 945.0)
    assert known.until(NAME) == 1010.0
    known.confirm(NAME + "y", 930.0)
    await Permissions(tmp_path, 60).ensure(NAME, "x", upstream)
    assert upstream.asked == 0
    await Permissions(tmp_path, 60).ensure(NAME + "y", "x", upstream)
    assert upstream.asked == 1


async def test_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(permissions, "_MEMORY", 5)
    known = Permissions(tmp_path, 60)
    for number in range(20):
        known.confirm(f"{NAME}{number}", 1000.0)
    assert len(known._confirmed) == 5

"""Tags: asked once per ttl and machine, and known when upstream does not answer."""

import asyncio
from pathlib import Path
from time import time

import pytest

from tests.cached import files_in
from wave_proxy.cache import tags as tags_module
from wave_proxy.cache.tags import Tags
from wave_proxy.errors import (
    Denied,
    ManifestUnknown,
    TooManyRequests,
    UpstreamError,
    UpstreamTimeout,
    UpstreamUnavailable,
    WaveError,
)

NAME = "docker.io/library/ubuntu:latest"
OLD, NEW = f"sha256:{'a' * 64}", f"sha256:{'b' * 64}"


class Upstream:
    """What a tag stands for now, or why that can't be said; counts the questions."""

    def __init__(self) -> None:
        self.digest = OLD
        self.error: Exception | None = None
        self.asked = 0

    async def __call__(self) -> tuple[str, bool]:
        self.asked += 1
        await asyncio.sleep(0)
        if self.error:
            raise self.error
        return self.digest, False


class Silent:
    """An upstream that does not answer until it is told to."""

    def __init__(self, digest: str) -> None:
        self.digest = digest
        self.speak = asyncio.Event()
        self.asked = 0

    async def __call__(self) -> tuple[str, bool]:
        self.asked += 1
        await self.speak.wait()
        return self.digest, False


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time as Tags sees it, in its only element."""
    now = [time()]
    monkeypatch.setattr(tags_module, "time", lambda: now[0])
    return now


async def quiet() -> None:
    """Let what runs in the background go on to its end, when that takes no time."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_tag_is_asked_for_once_per_ttl(tmp_path: Path, clock: list[float]) -> None:
    tags, upstream = Tags(tmp_path, 60), Upstream()
    first = await tags.find(NAME, upstream)
    assert (first.digest, first.checked, first.stale, first.until) == (OLD, clock[0], False, clock[0] + 48)
    upstream.digest = NEW
    clock[0] += 47
    assert await tags.find(NAME, upstream) == first
    await quiet()
    assert upstream.asked == 1
    clock[0] += 100
    second = await tags.find(NAME, upstream)
    assert (second.digest, second.checked, second.stale) == (NEW, clock[0], False)
    assert upstream.asked == 2


async def test_a_tag_in_use_is_asked_for_ahead(tmp_path: Path, clock: list[float]) -> None:
    tags, upstream = Tags(tmp_path, 60), Upstream()
    first = await tags.find(NAME, upstream)
    upstream.digest = NEW
    clock[0] += 50
    ahead = [await tags.find(NAME, upstream) for _ in range(3)]
    assert {(answer.digest, answer.checked, answer.stale) for answer in ahead} == {(OLD, first.checked, False)}
    assert max(answer.until for answer in ahead) < first.checked + 60
    await quiet()
    answer = await tags.find(NAME, upstream)
    assert (answer.digest, answer.checked) == (NEW, clock[0])
    assert upstream.asked == 2


async def test_a_thousand_at_once_ask_once(tmp_path: Path) -> None:
    tags, upstream = Tags(tmp_path, 60), Upstream()
    answers = await asyncio.gather(*(tags.find(NAME, upstream) for _ in range(1000)))
    assert {answer.digest for answer in answers} == {OLD}
    assert upstream.asked == 1


async def test_names_are_apart(tmp_path: Path) -> None:
    tags, one, other = Tags(tmp_path, 60), Upstream(), Upstream()
    other.digest = NEW
    assert (await tags.find(NAME, one)).digest == OLD
    assert (await tags.find(f"{NAME}2", other)).digest == NEW


@pytest.mark.parametrize(
    "error",
    [UpstreamUnavailable("503"), UpstreamTimeout("late"), TooManyRequests("slow down", 60), UpstreamError("nonsense")],
    ids=lambda error: type(error).__name__,
)
async def test_known_tag_is_given_when_upstream_fails(tmp_path: Path, clock: list[float], error: WaveError) -> None:
    tags, upstream = Tags(tmp_path, 60), Upstream()
    checked = (await tags.find(NAME, upstream)).checked
    upstream.error, upstream.digest = error, NEW
    clock[0] += 100_000
    for who in (tags, Tags(tmp_path, 60)):
        answer = await who.find(NAME, upstream)
        assert (answer.digest, answer.checked, answer.stale) == (OLD, checked, True)
    upstream.error = None
    asked = upstream.asked
    clock[0] += 4
    assert (await tags.find(NAME, upstream)).stale  # not asked again for a moment
    assert upstream.asked == asked
    clock[0] += 2
    assert (await tags.find(NAME, upstream)).stale  # asked in the background: nobody waits for what failed
    await quiet()
    recovered = await tags.find(NAME, upstream)
    assert (recovered.digest, recovered.stale) == (NEW, False)
    assert upstream.asked == asked + 1


async def test_clock_that_is_set_back_ends_the_pause(tmp_path: Path, clock: list[float]) -> None:
    tags, upstream = Tags(tmp_path, 60), Upstream()
    await tags.find(NAME, upstream)
    clock[0] += 100_000
    upstream.error = UpstreamUnavailable("503")
    await tags.find(NAME, upstream)
    clock[0] -= 90_000
    upstream.error, upstream.digest = None, NEW
    await tags.find(NAME, upstream)
    await quiet()
    assert (await tags.find(NAME, upstream)).digest == NEW


@pytest.mark.parametrize("error", [ManifestUnknown("gone"), Denied("private now")], ids=["gone", "denied"])
async def test_known_tag_that_upstream_refuses_is_refused(tmp_path: Path, clock: list[float], error: WaveError) -> None:
    tags, upstream = Tags(tmp_path, 60), Upstream()
    await tags.find(NAME, upstream)
    upstream.error = error
    clock[0] += 61
    for _ in range(2):
        with pytest.raises(type(error)):
            await tags.find(NAME, upstream)
    upstream.error = None
    assert not (await tags.find(NAME, upstream)).stale


async def test_refusal_in_the_background_is_the_next_ones(tmp_path: Path, clock: list[float]) -> None:
    tags, upstream = Tags(tmp_path, 60), Upstream()
    await tags.find(NAME, upstream)
    upstream.error = ManifestUnknown("gone")
    clock[0] += 50
    assert (await tags.find(NAME, upstream)).digest == OLD
    await quiet()
    with pytest.raises(ManifestUnknown):
        await tags.find(NAME, upstream)


async def test_unknown_tag_has_nothing_stale(tmp_path: Path) -> None:
    tags, upstream = Tags(tmp_path, 60), Upstream()
    upstream.error = UpstreamUnavailable("503")
    with pytest.raises(UpstreamUnavailable):
        await tags.find(NAME, upstream)
    upstream.error = None
    assert (await tags.find(NAME, upstream)).digest == OLD


async def test_workers_share_answers(tmp_path: Path, clock: list[float]) -> None:
    one, two, upstream = Tags(tmp_path, 60), Tags(tmp_path, 60), Upstream()
    first = await one.find(NAME, upstream)
    assert await two.find(NAME, upstream) == first
    clock[0] += 61
    upstream.digest = NEW
    second = await two.find(NAME, upstream)
    assert await one.find(NAME, upstream) == second
    assert (second.digest, upstream.asked) == (NEW, 2)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"digest": 1, "checked": null}', b"\xff"])
async def test_damaged_file_is_asked_for_again(tmp_path: Path, content: bytes) -> None:
    await Tags(tmp_path, 60).find(NAME, Upstream())
    (path,) = (path for path in (tmp_path / "tags").rglob("*") if path.is_file())
    path.write_bytes(content)
    upstream = Upstream()
    assert (await Tags(tmp_path, 60).find(NAME, upstream)).digest == OLD
    assert upstream.asked == 1
    assert files_in(tmp_path, "tags") == [path.name]


async def test_answer_from_the_future_does_not_last_for_ever(tmp_path: Path, clock: list[float]) -> None:
    tags, upstream = Tags(tmp_path, 60), Upstream()
    clock[0] += 86_400
    await tags.find(NAME, upstream)
    clock[0] -= 86_400  # the clock was wrong and has been set
    upstream.digest = NEW
    assert (await tags.find(NAME, upstream)).digest == NEW


async def test_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tags_module, "_MEMORY", 10)
    tags, upstream = Tags(tmp_path, 60), Upstream()
    for number in range(30):
        await tags.find(f"{NAME}{number}", upstream)
    assert len(tags._memory) == 10
    assert (await tags.find(f"{NAME}0", upstream)).digest == OLD  # from the disk
    assert upstream.asked == 30


async def test_name_may_be_anything(tmp_path: Path) -> None:
    tags, upstream = Tags(tmp_path, 60), Upstream()
    for name in ("../../etc/passwd:x", "a" * 5000, "a/b:\0", "é:1"):
        assert (await tags.find(name, upstream)).digest == OLD
    assert not (tmp_path / "etc").exists()
    assert len(files_in(tmp_path, "tags")) == 4


async def test_while_one_asks_the_others_get_what_is_known(tmp_path: Path, clock: list[float]) -> None:
    tags, silent = Tags(tmp_path, 60), Silent(NEW)
    first = await tags.find(NAME, Upstream())
    clock[0] += 60.5
    asking = asyncio.create_task(tags.find(NAME, silent))
    await quiet()
    others = await asyncio.gather(*(tags.find(NAME, silent) for _ in range(10)))
    assert {(other.digest, other.stale) for other in others} == {(first.digest, True)}
    assert not asking.done()
    silent.speak.set()
    assert (await asking).digest == NEW
    assert silent.asked == 1


async def test_nobody_gets_what_is_long_past_the_ttl_while_upstream_answers(tmp_path: Path, clock: list[float]) -> None:
    tags, silent = Tags(tmp_path, 60), Silent(NEW)
    await tags.find(NAME, Upstream())
    clock[0] += 3600
    asking = [asyncio.create_task(tags.find(NAME, silent)) for _ in range(10)]
    await quiet()
    assert not any(task.done() for task in asking)
    silent.speak.set()
    assert {(answer.digest, answer.stale) for answer in await asyncio.gather(*asking)} == {(NEW, False)}
    assert silent.asked == 1


@pytest.mark.parametrize("idle_s", [50, 61, 3600])
async def test_nobody_is_held_up_by_a_silent_upstream_for_long(
    tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch, idle_s: float
) -> None:
    monkeypatch.setattr(tags_module, "_PATIENCE_S", 0.05)
    tags, silent = Tags(tmp_path, 60), Silent(NEW)
    first = await tags.find(NAME, Upstream())
    clock[0] += idle_s
    answer = await tags.find(NAME, silent)
    assert (answer.digest, answer.stale) == (first.digest, idle_s > 60)
    await quiet()
    clock[0] += 20
    async with asyncio.timeout(0):  # the question was waited for long enough: nobody else waits at all
        later = await tags.find(NAME, silent)
    assert (later.digest, later.stale, silent.asked) == (OLD, True, 1)
    silent.speak.set()
    await quiet()
    assert (await tags.find(NAME, silent)).digest == NEW
    await tags.close()


async def test_who_waits_may_be_cancelled(tmp_path: Path) -> None:
    tags, silent = Tags(tmp_path, 60), Silent(NEW)
    first, second = [asyncio.create_task(tags.find(NAME, silent)) for _ in range(2)]
    await quiet()
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    silent.speak.set()
    assert (await second).digest == NEW
    assert silent.asked == 1

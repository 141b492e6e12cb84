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

    async def __call__(self) -> str:
        self.asked += 1
        await asyncio.sleep(0)
        if self.error:
            raise self.error
        return self.digest


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time as Tags sees it, in its only element."""
    now = [time()]
    monkeypatch.setattr(tags_module, "time", lambda: now[0])
    return now


async def test_a_tag_is_asked_for_once_per_ttl(tmp_path: Path, clock: list[float]) -> None:
    tags, upstream = Tags(tmp_path, 60), Upstream()
    first = await tags.find(NAME, upstream)
    assert (first.digest, first.checked, first.stale) == (OLD, clock[0], False)
    upstream.digest = NEW
    clock[0] += 59
    assert await tags.find(NAME, upstream) == first
    assert upstream.asked == 1
    clock[0] += 2
    second = await tags.find(NAME, upstream)
    assert (second.digest, second.checked, second.stale) == (NEW, clock[0], False)
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
    assert (await tags.find(NAME, upstream)).stale  # the registry is left alone for a moment
    assert upstream.asked == asked
    clock[0] += 11
    recovered = await tags.find(NAME, upstream)
    assert (recovered.digest, recovered.stale) == (NEW, False)


@pytest.mark.parametrize("error", [ManifestUnknown("gone"), Denied("private now")], ids=["gone", "denied"])
async def test_known_tag_that_upstream_refuses_is_refused(tmp_path: Path, clock: list[float], error: WaveError) -> None:
    tags, upstream = Tags(tmp_path, 60), Upstream()
    await tags.find(NAME, upstream)
    upstream.error = error
    clock[0] += 61
    with pytest.raises(type(error)):
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
    tags, silent = Tags(tmp_path, 60), asyncio.Event()
    upstream = Upstream()
    first = await tags.find(NAME, upstream)

    async def ask() -> str:
        await silent.wait()
        return NEW

    clock[0] += 61
    asking = asyncio.create_task(tags.find(NAME, ask))
    await asyncio.sleep(0)
    others = await asyncio.gather(*(tags.find(NAME, ask) for _ in range(10)))
    assert {(other.digest, other.stale) for other in others} == {(first.digest, True)}
    assert not asking.done()
    silent.set()
    assert (await asking).digest == NEW


async def test_the_one_who_asks_is_not_held_up_by_a_silent_upstream(tmp_path: Path, clock: list[float]) -> None:
    tags, silent = Tags(tmp_path, 60), asyncio.Event()
    first = await tags.find(NAME, Upstream())

    async def ask() -> str:
        await silent.wait()
        return NEW

    clock[0] += 61
    answer = await tags.find(NAME, ask)
    assert (answer.digest, answer.stale) == (first.digest, True)
    silent.set()
    while (await tags.find(NAME, ask)).digest != NEW:
        await asyncio.sleep(0)
    await tags.close()

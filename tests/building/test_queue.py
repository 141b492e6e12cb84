"""Many requests for builds at once: equal ones are one build, and different ones have their turns."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

from tests.building.works import (
    Works,
    log_of,
    open_works,
    order,
    read_state,
    records_of,
    wait_done,
    why_no_builds,
)
from tests.servers import WaveProxy
from wave_proxy.image.build import BuildRecord
from wave_proxy.state.redis import connect
from wave_proxy.state.usage import Usage

CLIENTS = 50
FLOOD = "10.0.0.1"
OTHERS = ("10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5")
MAX_RUNNING = 3


@pytest.fixture
def works(tmp_path: Path) -> Iterator[Works]:
    if reason := why_no_builds():
        pytest.skip(reason)
    with open_works(tmp_path) as opened:
        yield opened


async def test_equal_requests_at_two_programs_are_one_build(works: Works) -> None:
    text = f"FROM {works.base}\nRUN echo 'it ru''ns'\n"
    repository = f"{works.registry}/shared/images"
    with works.wave("wave") as one, works.wave("other") as other, ThreadPoolExecutor(CLIENTS) as clients:
        waves = [one, other] * (CLIENTS // 2)
        answers = list(clients.map(lambda wave: order(wave, text, buildRepository=repository), waves))
        (build_id,) = {answer["buildId"] for answer in answers}
        assert build_id.endswith("_1")
        assert len({answer["targetImage"] for answer in answers}) == CLIENTS
        assert wait_done(other, build_id)["succeeded"]
        log = log_of(one, build_id)
        assert log.count("\nit runs\n") == log.count(">> pushed ") == 1, log
        pulled = clients.map(lambda wave, answer: wave.pull(answer["targetImage"]).digest, waves, answers)
        assert len(set(pulled)) == 1
    async with connect(works.redis) as redis:
        assert (await Usage(redis).read("builds", None, "")).count == 1


def test_different_requests_have_their_turns(works: Works) -> None:
    with works.wave(max_running=MAX_RUNNING) as wave, ThreadPoolExecutor(len(OTHERS)) as clients:
        with sampled(works) as samples:
            answers = order_many(works, wave, FLOOD, 30)
            answers += [
                one for many in clients.map(lambda who: order_many(works, wave, who, 5), OTHERS) for one in many
            ]
            for answer in answers:
                assert wait_done(wave, answer["buildId"])["succeeded"]
        records = records_of(works.redis, [answer["buildId"] for answer in answers])
        assert len({record.build_id for record in records}) == CLIENTS
        assert max(samples) == most_at_once(records) == MAX_RUNNING
        check_turns(records)
        digests = [wave.pull(answer["targetImage"]).digest for answer in answers]
        assert digests == [record.digest for record in records]
        assert len(set(digests)) == CLIENTS


def order_many(works: Works, wave: WaveProxy, who: str, number: int) -> list[Mapping[str, Any]]:
    """The answers to so many requests of a client at that address, each for another image."""
    return [order(wave, f"FROM {works.base}\nENV OF={who}-{index}\n", who) for index in range(number)]


@contextmanager
def sampled(works: Works) -> Iterator[list[int]]:
    """How many builds run, looked up all the time: those that are claimed, and those that have a folder."""
    samples, stop = [0], Event()

    def sample() -> None:
        while not stop.wait(0.01):
            samples.append(read_state(works.redis, lambda builds: builds.queue_length())[1])
            samples.append(len(list((works.data / "builds").glob("*"))))

    thread = Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()


def most_at_once(records: list[BuildRecord]) -> int:
    """How many builds have run at the same time, by their records."""
    changes = sorted(change for record in records for change in ((record.started, 1), (record.finished, -1)))
    running, most = 0, 0
    for _, change in changes:
        running += change
        most = max(most, running)
    return most


def check_turns(records: list[BuildRecord]) -> None:
    """Who has many builds waiting does not keep others from having their first one soon; each has his own in order."""
    builds: dict[str, list[BuildRecord]] = defaultdict(list)
    for record in sorted(records, key=lambda record: record.created):
        builds[record.spec.owner].append(record)
    assert set(builds) == {FLOOD, *OTHERS}
    for own in builds.values():
        assert own == sorted(own, key=lambda record: record.started)
    for who in OTHERS:
        first = builds[who][0]
        before = [record for record in builds[FLOOD] if first.created < record.started < first.started]
        # One may have its slot already, and one has its turn.
        assert len(before) <= 2, f"{who} waited for {len(before)} builds of {FLOOD}"
    last = max(record.finished for who in OTHERS for record in builds[who])
    assert sum(record.started > last for record in builds[FLOOD]) >= 5

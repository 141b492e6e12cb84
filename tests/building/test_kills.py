"""Builders and whole programs that are killed or stopped while they fetch, build and push: no build is lost."""

import os
import signal
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Protocol

import pytest

from bench.images import Image, image, layer, random_blob
from bench.upstream import Faults, Upstream
from tests.building.works import (
    Works,
    builder_pids,
    leftovers,
    log_of,
    open_works,
    order,
    records_of,
    wait_done,
    why_no_builds,
)
from tests.clients.scene import shell_layer
from tests.patience import until
from tests.servers import WaveProxy, split_image
from wave_proxy.supervisor import runtime_folder

# How many builders each request of a phase loses, ten in all; of two programs, as one that has to start a builder again
# soon after the last time takes longer and longer for it.
KILLS = ((2, 3), (1, 2, 2))
MOST_KILLS = 3  # a build that has lost so many is reported failed


@pytest.fixture
def works(tmp_path: Path) -> Iterator[Works]:
    if reason := why_no_builds():
        pytest.skip(reason)
    with open_works(tmp_path) as opened:
        yield opened


@dataclass
class Held:
    """A build that stops in the middle of a phase, at each attempt, until ``let_go`` is called.

    ``is_there`` says whether it has come there, ``marker`` what its log says then.
    """

    build_id: str
    target: str
    marker: str
    is_there: Callable[[], bool]
    let_go: Callable[[], None]
    killed: int = 0

    def wait(self, wave: WaveProxy) -> None:
        """Return when this attempt is in the phase."""
        begins = f", attempt {self.killed + 1}\n"
        until(
            lambda: self.marker in log_of(wave, self.build_id).partition(begins)[2] and self.is_there(),
            f"{self.build_id} does not get to {self.marker!r}",
        )


class Phase(Protocol):
    """Makes builds that are held in a phase, each another one."""

    def hold(self, wave: WaveProxy) -> Held: ...


class Fetching:
    """The base image's registry is slow."""

    def __init__(self, stack: ExitStack, most: int) -> None:
        self._unused = [stack.enter_context(Upstream(faults=Faults(stall_at=1000))) for _ in range(most)]
        self.upstreams = tuple(upstream.address for upstream in self._unused)

    def hold(self, wave: WaveProxy) -> Held:
        upstream = self._unused.pop()
        base = _base_image(len(self._unused))
        upstream.add("slow/base", base, "1")
        answer = order(wave, f"FROM {upstream.address}/slow/base:1\nRUN true\n")
        slow = base.blobs[-1].digest
        return Held(
            answer["buildId"],
            answer["targetImage"],
            "Trying to pull",
            lambda: upstream.fetches(slow) > 0,
            upstream.faults.release.set,
        )


def _base_image(number: int) -> Image:
    shell = shell_layer()
    assert shell is not None
    return image([shell, layer({"opt/data": random_blob(100_000, number)})])


class Running:
    """A command of the container file waits."""

    def __init__(self, works: Works) -> None:
        self._works = works
        self._numbers = count()

    def hold(self, wave: WaveProxy) -> Held:
        door = f"run-{next(self._numbers)}"
        answer = order(wave, f"FROM {self._works.base}\nRUN echo 'it be''gins'; {self._works.wait_at(door)}\n")
        return Held(
            answer["buildId"],
            answer["targetImage"],
            "it begins\n",
            lambda: self._works.page.is_reached(door),
            lambda: self._works.page.open(door),
        )


class Pushing:
    """The target registry is slow: to take a blob, or the manifest."""

    def __init__(self, works: Works) -> None:
        self._works = works
        self._numbers = count()

    def hold(self, wave: WaveProxy) -> Held:
        number, target = next(self._numbers), self._works.target
        door = f"held-{number}/images {'manifests' if number % 2 else 'blobs'}"
        target.close(door)
        repository = f"{target.address}/held-{number}/images"
        answer = order(wave, f"FROM {self._works.base}\nENV NUMBER={number}\n", buildRepository=repository)
        return Held(
            answer["buildId"],
            answer["targetImage"],
            ">> pushing to",
            lambda: target.is_reached(door),
            lambda: target.open(door),
        )


class Storm:
    """One phase's requests, one after the other, whose builders are killed so many times."""

    def __init__(self, wave: WaveProxy, phase: Phase, kills: Sequence[int]) -> None:
        self._wave = wave
        self._phase = phase
        self._planned = list(kills)
        self.orders = [phase.hold(wave)]

    def wait(self) -> None:
        """Return when a build is in the phase, and those before it have ended."""
        for earlier in self.orders[:-1]:
            wait_done(self._wave, earlier.build_id)
        self.orders[-1].wait(self._wave)

    def note_kill(self) -> None:
        """Let the build go on, and order the next one, when it has lost the builders that it was to lose."""
        current = self.orders[-1]
        current.killed += 1
        if current.killed == self._planned[0]:
            current.let_go()
            del self._planned[0]
            if self._planned:
                self.orders.append(self._phase.hold(self._wave))


@pytest.mark.parametrize("kills", KILLS, ids=str)
def test_builder_killed_while_it_fetches_builds_and_pushes(works: Works, kills: Sequence[int]) -> None:
    with ExitStack() as stack:
        fetching = Fetching(stack, len(kills))
        wave = stack.enter_context(works.wave(upstreams=fetching.upstreams, max_running=6))
        builders = builder_pids(wave)
        storms = [Storm(wave, phase, kills) for phase in (fetching, Running(works), Pushing(works))]
        for _ in range(sum(kills)):
            for storm in storms:
                storm.wait()
            builders |= kill_builder(wave)
            for storm in storms:
                storm.note_kill()
        for storm in storms:
            for held in storm.orders:
                check_end(wave, held)
            assert [held.killed for held in storm.orders] == list(kills)
        nothing_left(works.data, works.redis, builders)


def kill_builder(wave: WaveProxy) -> set[int]:
    """``kill -9``; gives the builder that is there then."""
    (killed,) = builder_pids(wave)
    os.kill(killed, signal.SIGKILL)
    until(lambda: builder_pids(wave) - {killed}, "the builder is not started again")
    return builder_pids(wave)


def check_end(wave: WaveProxy, held: Held) -> None:
    """The request ends in an image, or in a failure that is told."""
    status = wait_done(wave, held.build_id)
    log = log_of(wave, held.build_id)
    assert status["succeeded"] is (held.killed < MOST_KILLS), log
    assert log.count("The builder died.") == min(held.killed, MOST_KILLS - 1), log
    if status["succeeded"]:
        assert wave.pull(held.target).layers
        return
    repository, tag = split_image(held.target)
    answer = wave.request("GET", f"/v2/{repository}/manifests/{tag}")
    assert answer.status == 404
    assert "the builder died 3 times" in answer.body.decode()


def nothing_left(data: Path, redis: str, builders: Collection[int]) -> None:
    """Return when the builds have left nothing. Raises AssertionError with what they have left."""
    until(lambda: not leftovers(data, redis, builders), lambda: f"left behind: {leftovers(data, redis, builders)}")


def hold_all(wave: WaveProxy, phases: Sequence[Phase]) -> list[Held]:
    """One build in each of the phases."""
    held = [phase.hold(wave) for phase in phases]
    for one in held:
        one.wait(wave)
    return held


def test_whole_program_killed_and_started_again(works: Works) -> None:
    with ExitStack() as stack:
        fetching = Fetching(stack, 1)
        wave = stack.enter_context(works.wave(upstreams=fetching.upstreams, redis="", max_running=3))
        running = hold_all(wave, (fetching, Running(works), Pushing(works)))
        waiting = [order(wave, f"FROM {works.base}\nENV WAITING={number}\n") for number in range(3)]
        builders = builder_pids(wave)
        wave.kill()
        wave.start()
        builders |= builder_pids(wave)
        for held in running:
            held.killed += 1
            held.let_go()
        for held in running:
            check_end(wave, held)
        for answer in waiting:
            assert wait_done(wave, answer["buildId"])["succeeded"]
            assert wave.pull(answer["targetImage"]).layers
        nothing_left(works.data, f"unix://{runtime_folder(works.data)}/redis.sock", builders)


def test_stopped_in_good_order_while_it_fetches_builds_and_pushes(works: Works) -> None:
    with ExitStack() as stack:
        fetching = Fetching(stack, 1)
        wave = stack.enter_context(works.wave(upstreams=fetching.upstreams, max_running=3))
        running = hold_all(wave, (fetching, Running(works), Pushing(works)))
        waiting = order(wave, f"FROM {works.base}\nENV WAITING=1\n")["buildId"]
        builders = builder_pids(wave)
        assert wave.stop() == 0
        build_ids = [*(held.build_id for held in running), waiting]
        left = leftovers(works.data, works.redis, builders)
        assert "queue (4, 0)" in left
        assert not [one for one in left if one.startswith(("process", "folder", "mount", "cgroup", "claims"))]
        for held in running:
            held.let_go()
        wave.start()
        builders |= builder_pids(wave)
        for held in running:
            check_end(wave, held)
        assert wait_done(wave, waiting)["succeeded"]
        assert {record.attempt for record in records_of(works.redis, build_ids)} == {1}
        nothing_left(works.data, works.redis, builders)

"""Logs while they are written, and pulls of images that are still being built."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from shutil import which
from subprocess import PIPE, Popen
from threading import Thread

import pytest

from tests.building.works import Works, log_of, open_works, order, wait_done, why_no_builds
from tests.patience import PATIENCE_S, until
from tests.servers import Response, WaveProxy, split_image
from wave_proxy.image.oci import ACCEPT_MANIFESTS

# Clients that tell who they are, and would all be held for minutes.
USER_AGENTS = ("docker/28.2.2 go/go1.24", "containers/5.34.2 (github.com/containers/image)", "go-containerregistry", "")


@pytest.fixture(scope="module")
def works(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Works]:
    if reason := why_no_builds():
        pytest.skip(reason)
    with open_works(tmp_path_factory.mktemp("works")) as opened:
        yield opened


@pytest.fixture(scope="module")
def wave(works: Works) -> Iterator[WaveProxy]:
    with works.wave() as started:
        yield started


class Curl:
    """``curl -N`` of a log that is followed."""

    def __init__(self, wave: WaveProxy, build_id: str) -> None:
        address = f"{wave.url}/v1alpha1/builds/{build_id}/logs?follow=1"
        self._process = Popen(["curl", "-sSN", "--fail", address], stdout=PIPE)
        self._lines: Queue[bytes] = Queue()
        self.seen = b""
        self._reader = Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(b"")

    def read_to(self, wanted: bytes) -> None:
        """Read on to that line; to the end when it is empty. Raises queue.Empty when nothing more comes."""
        while (line := self._lines.get(timeout=PATIENCE_S)) != wanted:
            assert line, self.seen.decode()
            self.seen += line

        self.seen += line

    def end(self) -> int:
        """Its exit code."""
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()
        return self._process.wait(PATIENCE_S)


@pytest.mark.skipif(which("curl") is None, reason="curl is not installed")
def test_lines_are_seen_as_they_are_written_and_stay_the_same(works: Works, wave: WaveProxy) -> None:
    steps = "; ".join(f"echo 'st''ep {name} ü'; {works.wait_at(f'log-{name}')}" for name in ("one", "two", "three"))
    build_id = order(wave, f"FROM {works.base}\nRUN {steps}\nRUN seq=0; echo 'the e''nd'\n")["buildId"]
    curls = [Curl(wave, build_id)]
    for name in ("one", "two", "three"):
        for curl in curls:
            curl.read_to(f"step {name} ü\n".encode())
        curls.append(Curl(wave, build_id))  # who comes later gets what was before
        works.page.open(f"log-{name}")
    for curl in curls:
        curl.read_to(b"the end\n")
        curl.read_to(b"")
        assert curl.end() == 0
    assert wait_done(wave, build_id)["succeeded"]
    whole = wave.request("GET", f"/v1alpha1/builds/{build_id}/logs").body
    assert [curl.seen for curl in curls] == [whole] * 4
    assert whole.startswith(f">> build {build_id} ".encode())
    assert b">> pushed " in whole.splitlines()[-1]


def ask(wave: WaveProxy, method: str, target: str, user_agent: str = "") -> Response:
    """Ask for an image's manifest."""
    repository, tag = split_image(target)
    headers = {"Accept": ACCEPT_MANIFESTS, "User-Agent": user_agent}
    return wave.request(method, f"/v2/{repository}/manifests/{tag}", headers=headers)


def test_pull_that_waits_for_a_build_that_fails_gets_the_end_of_its_log(works: Works, wave: WaveProxy) -> None:
    answer = order(wave, f"FROM {works.base}\nRUN {works.wait_at('fails')}; echo 'so''me words'; exit 3\n")
    with ThreadPoolExecutor(1) as client:
        waiting = client.submit(ask, wave, "GET", answer["targetImage"])
        until(lambda: works.page.is_reached("fails"), "the build does not begin")
        assert not waiting.done()
        works.page.open("fails")
        told = waiting.result()
    assert told.status == 404
    (error,) = told.json()["errors"]
    assert error["code"] == "MANIFEST_UNKNOWN"
    status = wait_done(wave, answer["buildId"])
    assert status["succeeded"] is False
    assert status["reason"] in error["message"]
    assert "\nsome words\n" in error["message"]
    assert error["message"].splitlines()[-1] == log_of(wave, answer["buildId"]).splitlines()[-1]


def test_every_client_is_held_until_the_build_ends(works: Works, wave: WaveProxy) -> None:
    answer = order(wave, f"FROM {works.base}\nRUN {works.wait_at('pulled')}\n")
    asked = [(method, user_agent) for user_agent in USER_AGENTS for method in ("HEAD", "GET")]
    with ThreadPoolExecutor(len(asked)) as clients:
        waiting = [clients.submit(ask, wave, method, answer["targetImage"], agent) for method, agent in asked]
        until(lambda: works.page.is_reached("pulled"), "the build does not begin")
        until(lambda: log_of(wave, answer["buildId"]), "the log does not begin")
        assert not [one for one in waiting if one.done()]
        works.page.open("pulled")
        answers = [one.result() for one in waiting]
    assert {told.status for told in answers} == {200}
    pulled = wave.pull(answer["targetImage"])
    assert {told.headers["Docker-Content-Digest"] for told in answers} == {pulled.digest}
    assert {told.body for told in answers} == {b"", pulled.manifest}

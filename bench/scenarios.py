"""What is measured: each scenario starts its servers, checks their answers, and gives its figures."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from itertools import count
from math import ceil
from pathlib import Path
from shutil import rmtree
from statistics import median
from threading import Event, Thread
from time import monotonic, sleep

from bench.clients import (
    Load,
    check_image,
    drain,
    paced,
    peak_resident,
    processor_s,
    reset_peak,
    resident,
    touch_memory,
    wrk,
)
from bench.herd import Herd, wall_s
from bench.peers import (
    DISTRIBUTION,
    NGINX_CACHE,
    NGINX_FILES,
    PULL_THROUGH,
    WAVE,
    Origin,
    Peer,
    Sample,
    Stage,
    find_program,
    make_wave,
    running_wave,
    stage,
)
from bench.plan import MB, WORKERS, Plan, alternate, blob_image, check_all, failures_of, small_image
from bench.polls import status
from bench.quotas import quota, redis_away
from bench.report import Goal, Result
from bench.scale import connections, tokens
from tests.servers import http_request, pull_blob
from wave_proxy.image.oci import ACCEPT_MANIFESTS

_PROXIES = (WAVE, NGINX_CACHE, PULL_THROUGH)
_HOW = {True: "keep-alive", False: "a connection a request"}
_OPEN = 256  # connections of a storm
_IDLE_S = 1.0  # after the start, until memory is read


# --- manifests -------------------------------------------------------------------------------------------------------


def warm_manifest(plan: Plan) -> Iterator[Result]:
    """A warm manifest by tag from one worker: keep-alive, and a connection a request."""
    find_program("wrk")
    names = (WAVE, NGINX_CACHE, NGINX_FILES, DISTRIBUTION, PULL_THROUGH)
    goals = Goal("at least", 1.5, NGINX_CACHE), Goal("at least", 50, PULL_THROUGH)
    with stage(plan.folder / "stage", [small_image(1)], names) as made:
        check_all(made)
        for result in _manifest_rates(plan, made, keep_alive=True):
            yield replace(result, goals=goals)
        yield from _manifest_rates(plan, made, keep_alive=False)
        check_all(made)


def _manifest_rates(plan: Plan, made: Stage, *, keep_alive: bool) -> Iterator[Result]:
    """Answers a second, and answers a second of the server's processor time: ``wrk`` may be busier than the server."""
    (sample,) = made.samples
    duration_s = plan.choose(4, 1)
    notes: list[str] = []
    shares: dict[str, list[float]] = {}

    def measure(peer: Peer, _: int) -> dict[str, float]:
        path = peer.manifest_path(sample)
        before_s = processor_s(peer.pids())
        load = wrk(peer.address, path, connections=32, duration_s=duration_s, keep_alive=keep_alive)
        took_s = processor_s(peer.pids()) - before_s
        if load.errors:
            notes.append(f"{peer.name}: {load.errors} errors beside {load.answers} good answers")
        shares.setdefault(peer.name, []).append(load.wrk_share)
        return {"1/s": load.rate, "1/processor s": load.answers / max(took_s, 0.01)}

    repeats = plan.repeats if keep_alive else plan.choose(plan.repeats, 1)
    figures = alternate(made.peers, repeats, measure)
    busy = ", ".join(f"{100 * median(some):.0f} % with {name}" for name, some in shares.items())
    notes.append(f"of its core, wrk itself took {busy}")
    for unit in ("1/s", "1/processor s"):
        work = f"warm manifest, {_HOW[keep_alive]}"
        yield Result("warm-manifest", work, unit, figures[unit], missing=made.missing, notes=notes)
        notes = []


def warm_pull(plan: Plan) -> Iterator[Result]:
    """200 clients pull a warm image as Docker does: HEAD, manifest, config, five layers, a connection a request."""
    clients = plan.choose(200, 50)
    names = (*_PROXIES, NGINX_FILES)
    with ExitStack() as stack:
        made = stack.enter_context(stage(plan.folder / "stage", [small_image(1)], names, workers=WORKERS))
        herd = stack.enter_context(Herd(WORKERS))
        (sample,) = made.samples
        check_all(made)
        failures: list[str] = []

        def measure(peer: Peer, _: int) -> dict[str, float]:
            pulls = herd.pull(peer.image_name(sample), clients)
            failures.extend(failures_of(peer, [pull.error for pull in pulls]))
            return {"rate": clients / wall_s(pulls)}

        figures = alternate(made.peers, plan.repeats, measure)["rate"]
    work = f"{clients} clients pull a warm image"
    yield Result("warm-pull", work, "pulls/s", figures, missing=made.missing, notes=failures)


def storm(plan: Plan) -> Iterator[Result]:
    """500,000 manifest pulls from one token over all workers: p99, errors, requests that upstream saw."""
    find_program("wrk")
    # A tag is revalidated once per tag_ttl: not during this.
    config = '[cache]\ntag_ttl = "1h"\n'
    with stage(plan.folder / "stage", [small_image(1)], [WAVE], workers=WORKERS, config=config) as made:
        check_all(made)
        yield from _storm(made, plan.choose(500_000, 50_000), plan.repeats, keep_alive=True)
        yield from _storm(made, plan.choose(100_000, 20_000), plan.choose(plan.repeats, 1), keep_alive=False)
        check_all(made)


def _storm(made: Stage, wanted: int, repeats: int, *, keep_alive: bool) -> Iterator[Result]:
    (sample,) = made.samples

    def measure(peer: Peer, _: int) -> dict[str, float]:
        before = len(made.origin.asked())
        loads = _ask(peer, sample, wanted, keep_alive=keep_alive)
        answers = sum(load.answers for load in loads)
        return {
            "1/s": answers / sum(load.duration_s for load in loads),
            "p99, ms": max(load.p99_s for load in loads) * 1000,
            "errors": sum(load.errors for load in loads) + max(wanted - answers, 0),
            "upstream requests": len(made.origin.asked()) - before,
        }

    limits = {"p99, ms": 20.0, "errors": 0.0, "upstream requests": 0.0}
    measured = alternate(made.peers, repeats, measure)
    mean_s = _OPEN / median(measured["1/s"][WAVE])
    notes = {"p99, ms": [f"{_OPEN} requests are open all the time: {mean_s * 1000:.2g} ms in the mean at this rate"]}
    for unit, figures in measured.items():
        goals = [Goal("at most", limits[unit])] if unit in limits else []
        work = f"{wanted:,} pulls of one token, {_HOW[keep_alive]}"
        yield Result("storm", work, unit, figures, goals, notes=notes.get(unit, ()))


def _ask(peer: Peer, sample: Sample, wanted: int, *, keep_alive: bool) -> list[Load]:
    """Slices of a storm until there are so many answers, or there is none for a while."""
    loads: list[Load] = []
    duration_s = 1
    while (left := wanted - sum(load.answers for load in loads)) > 0:
        load = wrk(
            peer.address, peer.manifest_path(sample), connections=_OPEN, duration_s=duration_s, keep_alive=keep_alive
        )
        loads.append(load)
        if not load.answers:
            break
        duration_s = max(1, min(ceil((left - load.answers) / load.rate), 20))
    return loads


def black_hole(plan: Plan) -> Iterator[Result]:
    """p99 of pulls of a tag in use while upstream takes connections and says nothing, and while it answers."""
    duration_s = plan.choose(6, 2)
    # Short, so that many of the pulls fall due for revalidation.
    config = '[cache]\ntag_ttl = "1s"\n'
    peers: list[Peer] = []
    samples: dict[str, Sample] = {}
    origins: list[Origin] = []
    with ExitStack() as stack:
        for name in ("upstream answers", "upstream black-holed"):
            made = stack.enter_context(
                stage(plan.folder / f"stage-{len(peers)}", [small_image(1)], [WAVE], config=config)
            )
            check_all(made)
            peers.append(replace(made.peers[0], name=name))
            samples[name] = made.samples[0]
            origins.append(made.origin)
        stack.enter_context(origins[1].black_holed())

        def measure(peer: Peer, _: int) -> dict[str, float]:
            path = peer.manifest_path(samples[peer.name])
            # Of a tag that nobody has wanted for longer than its ttl, the first to ask wait for up to a second.
            paced(peer.address, path, connections=20, interval_s=0.02, duration_s=1.5)
            latencies = paced(peer.address, path, connections=20, interval_s=0.02, duration_s=duration_s)
            return {"p99": sorted(latencies)[int(0.99 * len(latencies))] * 1000}

        figures = alternate(peers, plan.repeats, measure)["p99"]
    goal = Goal("at most", 1.05, "upstream answers")
    yield Result("black-hole", "p99 of 1,000 warm pulls/s", "ms", figures, [goal], ours="upstream black-holed")


# --- blobs -----------------------------------------------------------------------------------------------------------


def warm_blob(plan: Plan) -> Iterator[Result]:
    """A warm blob of 256 MiB to 8 clients at once, from one worker."""
    megabytes, clients = plan.choose(256, 128), 8
    names = (WAVE, NGINX_FILES, NGINX_CACHE, DISTRIBUTION, PULL_THROUGH)
    with stage(plan.folder / "stage", [blob_image(megabytes << 20, 1)], names) as made:
        (sample,) = made.samples
        (layer,) = sample.layers
        check_all(made)

        def measure(peer: Peer, _: int) -> dict[str, float]:
            path = peer.blob_path(sample, layer["digest"])
            return {"rate": clients * layer["size"] / drain(peer.address, path, layer["size"], clients) / 1e9}

        figures = alternate(made.peers, plan.repeats, measure)["rate"]
    goal = Goal("at least", 0.95, NGINX_FILES)
    work = f"warm blob of {megabytes} MiB, {clients} clients"
    yield Result("warm-blob", work, "GB/s", figures, [goal], missing=made.missing)


def cold_blob(plan: Plan) -> Iterator[Result]:
    """A blob of 256 MiB that is not there yet, to one client from one worker; another blob in each round."""
    megabytes = plan.choose(256, 128)
    images = (blob_image(megabytes << 20, seed) for seed in range(plan.repeats))
    with stage(plan.folder / "stage", images, _PROXIES) as made:

        def measure(peer: Peer, round_: int) -> dict[str, float]:
            sample = made.samples[round_]
            (layer,) = sample.layers
            accept = {"Accept": ACCEPT_MANIFESTS}
            manifest = http_request(peer.address, "GET", peer.manifest_path(sample), headers=accept)
            assert manifest.status == 200, f"{peer.name}: {manifest.body!r}"
            os.sync()  # what others have written shall not be written to disk in our time
            touch_memory(4 * layer["size"])
            duration_s = drain(peer.address, peer.blob_path(sample, layer["digest"]), layer["size"], 1)
            pull_blob(peer.address, peer.repository_of(sample), layer)
            return {"rate": layer["size"] / duration_s / 1e9}

        figures = alternate(made.peers, plan.repeats, measure)["rate"]
    goals = Goal("at least", 1.1, PULL_THROUGH), Goal("at least", 1.0, NGINX_CACHE)
    yield Result("cold-blob", f"cold blob of {megabytes} MiB", "GB/s", figures, goals, missing=made.missing)


def herd(plan: Plan) -> Iterator[Result]:
    """1,000 clients pull an image with one cold blob, over all workers: bytes from upstream, memory, time."""
    megabytes, clients = plan.choose(16, 2), plan.choose(1000, 200)
    repeats = plan.choose(plan.repeats, 1)
    images = (blob_image(megabytes << 20, seed) for seed in range(repeats))
    failures: list[str] = []
    with ExitStack() as stack:
        made = stack.enter_context(stage(plan.folder / "stage", images, _PROXIES, workers=WORKERS))
        pullers = stack.enter_context(Herd(WORKERS))

        def measure(peer: Peer, round_: int) -> dict[str, float]:
            sample = made.samples[round_]
            (layer,) = sample.layers
            name, before = peer.image_name(sample), len(made.origin.asked())
            reset_peak(peer.pids())
            pulls = pullers.pull(name, clients)
            failures.extend(failures_of(peer, [pull.error for pull in pulls]))
            peak = peak_resident(peer.pids())
            check_image(peer, sample)
            fetched = sum(asked.size for asked in made.origin.asked()[before:] if asked.path.endswith(layer["digest"]))
            return {"fetched": fetched / layer["size"], "peak": peak / MB, "wall": wall_s(pulls)}

        figures = alternate(made.peers, repeats, measure)
    kinds: dict[str, tuple[str, str, list[Goal]]] = {
        "fetched": ("bytes from upstream", "blobs", [Goal("at most", 1.0)]),
        "peak": ("peak memory of all workers", "MB", [Goal("at most", 300)]),
        "wall": ("until the last client has it", "s", []),
    }
    for kind, (work, unit, goals) in kinds.items():
        title = f"{clients:,} clients, cold blob of {megabytes} MiB: {work}"
        notes = failures if kind == "wall" else ()
        yield Result("herd", title, unit, figures[kind], goals, missing=made.missing, notes=notes)


# --- the process -----------------------------------------------------------------------------------------------------


def start(plan: Plan) -> Iterator[Result]:
    """From ``wave-proxy serve`` on an empty data folder to its first answer, and the memory of an idle proxy worker."""
    figures: dict[str, list[float]] = {"answer": [], "ready": [], "idle": []}
    for round_ in range(plan.repeats):
        proxy = make_wave(plan.folder / f"data-{round_}")
        with _waiting_for_answer(proxy.address) as first, running_wave(proxy):
            figures["ready"].append(monotonic() - first.began)
            figures["answer"].append(first.duration_s())
            sleep(_IDLE_S)
            figures["idle"].append(resident(proxy.workers()) / MB)
    kinds = {
        "answer": ("start to first answer under /v2/", "s", [Goal("at most", 1.0)]),
        "ready": ("start to ready, API included", "s", []),
        "idle": ("idle proxy worker", "MB", [Goal("at most", 60)]),
    }
    for kind, (work, unit, goals) in kinds.items():
        yield Result("start", work, unit, {WAVE: figures[kind]}, goals)


class _FirstAnswer(Thread):
    """Asks for ``/v2/`` from now on, until there is an answer or nobody waits for it any more."""

    def __init__(self, address: str) -> None:
        super().__init__(daemon=True)
        self.began = monotonic()
        self.given_up = Event()
        self._address = address
        self._ended = 0.0

    def run(self) -> None:
        while not self.given_up.wait(0.005):
            with suppress(OSError):
                if http_request(self._address, "GET", "/v2/", timeout_s=5).status == 200:
                    self._ended = monotonic()
                    return

    def duration_s(self) -> float:
        """Seconds to the first answer. Raises AssertionError when there is none."""
        self.join(10)
        assert self._ended, f"no answer at {self._address}"
        return self._ended - self.began


@contextmanager
def _waiting_for_answer(address: str) -> Iterator[_FirstAnswer]:
    first = _FirstAnswer(address)
    first.start()
    try:
        yield first
    finally:
        first.given_up.set()
        first.join()


SCENARIOS: dict[str, Callable[[Plan], Iterator[Result]]] = {
    "warm-manifest": warm_manifest,
    "warm-blob": warm_blob,
    "cold-blob": cold_blob,
    "warm-pull": warm_pull,
    "herd": herd,
    "storm": storm,
    "black-hole": black_hole,
    "quota": quota,
    "redis-away": redis_away,
    "connections": connections,
    "tokens": tokens,
    "status": status,
    "start": start,
}

_numbers = count()


def run_scenario(name: str, folder: Path, repeats: int, *, quick: bool) -> list[Result]:
    """The figures of a scenario; nothing of it is left in the folder.

    Raises Missing when a program is not installed, and AssertionError, OSError, RuntimeError, PullFailed when a server
    does not do what it should.
    """
    place = folder / f"{next(_numbers)}"
    place.mkdir()
    try:
        return list(SCENARIOS[name](Plan(place, repeats, quick)))
    finally:
        rmtree(place, ignore_errors=True)

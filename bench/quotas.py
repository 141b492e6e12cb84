"""Scenarios of quotas: exact under a storm, over workers and programs, and with Redis away in the middle of it."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from time import monotonic, sleep

from bench.peers import ADDED_ENV, WAVE, make_wave, running_wave, stage
from bench.plan import Plan, small_image
from bench.redis_server import RedisServer, redis_that_may_die
from bench.report import Goal, Result
from bench.storm import Outcome, Storm, told
from bench.windows import least_limit, share_admitted
from tests.servers import WaveProxy, split_image
from wave_proxy.image.limit import Limit
from wave_proxy.image.oci import ACCEPT_MANIFESTS

_WORKERS = 4  # as the quota's goal says, also where there are fewer cores
_CONNECTIONS = 64  # so that the kernel gives some to each worker
_PERIODS = 2
_UNLIMITED = "1000000000/1h"  # counted like any other
_RETURN_LIMIT_S = 60.0  # for what a worker has to report, and for permits on lease


def warm_path(proxies: Sequence[WaveProxy], image: str) -> str:
    """The path of an image's manifest under a token that all these programs know, asked for at each; none has counted.

    Raises AssertionError.
    """
    answer = proxies[0].submit(containerImage=image, containerConfig={"env": [ADDED_ENV]})
    repository, tag = split_image(answer["targetImage"])
    path = f"/v2/{repository}/manifests/{tag}"
    for proxy in proxies:
        answered = proxy.request("HEAD", path, headers={"Accept": ACCEPT_MANIFESTS})
        assert answered.status == 200, f"HEAD {path}: {answered.status}"
    return path


# --- exact -----------------------------------------------------------------------------------------------------------


def quota(plan: Plan) -> Iterator[Result]:
    """A storm against 2,000 pulls a minute: the most let in, and the least. Four workers; two programs, one Redis."""
    limit = Limit(400, 2.0) if plan.quick else Limit(2000, 60.0)
    for number, (name, programs) in enumerate((("four workers", 1), ("two programs of two workers", 2))):
        outcome = _storm(plan, f"stage-{number}", limit, programs)
        most = least_limit(outcome.admitted, limit.period_s) / limit.max
        share = share_admitted(outcome.admitted, limit.max, limit.period_s, _PERIODS)
        work = f"storm against {limit}, {name}"
        notes = [f"{len(outcome.admitted):,} let in, others by status: {told(outcome.others)}"]
        notes += [f"{outcome.errors} errors"] if outcome.errors else []
        yield Result("quota", f"{work}: most in any window", "limits", {WAVE: [most]}, [Goal("at most", 1.0)])
        yield Result(
            "quota", f"{work}: let in", "of what is possible", {WAVE: [share]}, [Goal("at least", 0.99)], notes=notes
        )


def _storm(plan: Plan, folder: str, limit: Limit, programs: int) -> Outcome:
    """What a storm of some periods gets from so many programs with four workers in all."""
    config = f'[quota]\npull_anonymous = "{limit}"\nwait = "0s"\n'
    duration_s = limit.period_s * _PERIODS + 0.5
    with ExitStack() as stack:
        made = stack.enter_context(stage(plan.folder / folder, [small_image(1)], []))
        redis = stack.enter_context(redis_that_may_die())
        proxies = [
            make_wave(
                plan.folder / folder / f"wave-{number}",
                origin=made.origin.address,
                workers=_WORKERS // programs,
                config=config,
                redis=redis.url,
            )
            for number in range(programs)
        ]
        for proxy in proxies:
            stack.enter_context(running_wave(proxy))
        path = warm_path(proxies, made.origin.image_name(made.samples[0]))
        addresses = [proxy.address for proxy in proxies]
        storm = stack.enter_context(Storm(addresses, path, connections=_CONNECTIONS, duration_s=duration_s))
        storm.begin()
        return storm.outcome()


# --- Redis away ------------------------------------------------------------------------------------------------------


def redis_away(plan: Plan) -> Iterator[Result]:
    """Redis hangs, dies and comes back in the middle of a storm: pulls meanwhile, errors, and the count afterwards."""
    before_s, away_s, after_s = 1.0, float(plan.choose(30, 5)), 2.0
    config = f'[quota]\npull_anonymous = "{_UNLIMITED}"\nwait = "0s"\n'
    with ExitStack() as stack:
        made = stack.enter_context(stage(plan.folder / "stage", [small_image(1)], []))
        redis = stack.enter_context(redis_that_may_die())
        proxy = make_wave(
            plan.folder / "wave", origin=made.origin.address, workers=_WORKERS, config=config, redis=redis.url
        )
        stack.enter_context(running_wave(proxy))
        path = warm_path([proxy], made.origin.image_name(made.samples[0]))
        duration_s = before_s + away_s + after_s
        storm = stack.enter_context(Storm([proxy.address], path, connections=_CONNECTIONS, duration_s=duration_s))
        began = storm.begin()
        sleep(before_s)
        gone, back = interrupt(redis, away_s)
        outcome = storm.outcome()
        counted = settled_permits(redis, len(outcome.admitted))
    admitted = outcome.admitted
    work = f"storm, Redis hangs and dies for {away_s:g} s"
    there, away = "Redis there", "Redis away"
    rates = {
        there: [admitted.between(began, gone) / (gone - began)],
        away: [admitted.between(gone, back) / (back - gone)],
    }
    yield Result("redis-away", f"{work}: pulls", "1/s", rates, ours=away)
    slowest = {there: [admitted.slowest_s(until=gone)], away: [admitted.slowest_s(since=gone)]}
    yield Result("redis-away", f"{work}: longest answer", "s", slowest, ours=away)
    failed = [f"others by status: {told(outcome.others)}"] if outcome.others else []
    errors = {WAVE: [float(outcome.errors + outcome.others[429])]}
    yield Result("redis-away", f"{work}: errors", "errors", errors, [Goal("at most", 0)], notes=failed)
    share = {WAVE: [counted / max(len(admitted), 1)]}
    goals = Goal("at least", 1.0), Goal("at most", 1.0)
    yield Result("redis-away", f"{work}: counted afterwards", "of the pulls", share, goals)


def interrupt(redis: RedisServer, away_s: float) -> tuple[float, float]:
    """Let Redis hang for one half of the time and be dead for the other; returns when it went and when it was back."""
    gone = monotonic()
    redis.hang()
    sleep(away_s / 2)
    redis.kill()
    sleep(away_s / 2)
    redis.start()
    return gone, monotonic()


def settled_permits(redis: RedisServer, expected: int) -> int:
    """How many permits are in use when all is reported: when it is the expected number, or does not become it."""
    deadline = monotonic() + _RETURN_LIMIT_S
    while (counted := redis.permits_in_use()) != expected and monotonic() < deadline:
        sleep(0.05)
    return counted

"""Scenarios of great numbers: connections that are open, tokens that are known."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from resource import RLIMIT_NOFILE, getrlimit

from bench.clients import ask_each, drain, processor_s, resident, socket_memory, wrk
from bench.crowd import Crowd
from bench.peers import ADDED_ENV, WAVE, Origin, Peer, Sample, find_program, make_wave, running_wave, stage
from bench.plan import MB, Plan, alternate, blob_image, check_all, small_image
from bench.redis_server import RedisServer, redis_that_may_die
from bench.report import Goal, Result
from tests.servers import WaveProxy, pull, split_image

# --- connections -----------------------------------------------------------------------------------------------------

_ALONE, _CROWDED = "alone", "beside the crowd"
_SPARE_FILES = 1000


def connections(plan: Plan) -> Iterator[Result]:
    """10,000 open connections, 1,000 of them slow readers of a blob: fast clients beside them; memory of the worker."""
    find_program("wrk")
    megabytes = plan.choose(256, 64)
    total, slow, notes = _affordable(10_000, 1000)
    config = '[http]\nidle_timeout = "1h"\n'  # those who are idle shall stay so
    with ExitStack() as stack:
        images = [small_image(1), blob_image(megabytes << 20, 2)]
        made = stack.enter_context(stage(plan.folder / "stage", images, [WAVE], config=config))
        check_all(made)
        (peer,), (small, big) = made.peers, made.samples
        (layer,) = big.layers
        manifest, blob = peer.manifest_path(small), peer.blob_path(big, layer["digest"])
        crowd = stack.enter_context(Crowd(peer.address))
        resident_kb: list[float] = []
        kernel_kb: list[float] = []

        def measure(of: Peer, _: int) -> dict[str, float]:
            crowded = of.name == _CROWDED
            if crowded:
                before, kernel_before = resident(peer.pids()), socket_memory()
                crowd.join(manifest, total - slow, blob, slow)
                resident_kb.append((resident(peer.pids()) - before) / total / 1000)
            load = wrk(peer.address, manifest, connections=32, duration_s=plan.choose(4, 1))
            if crowded:  # by now there is no more room for the slow ones
                kernel_kb.append((socket_memory() - kernel_before) / total / 1000)
            drained_s = drain(peer.address, blob, layer["size"], 8)
            if crowded:
                presence = crowd.leave()
                assert presence.open == total, f"{total - presence.open} of {total} connections were closed"
                assert presence.received, "slow readers got nothing"
            return {"1/s": load.rate, "GB/s": 8 * layer["size"] / drained_s / 1e9}

        figures = alternate([replace(peer, name=name) for name in (_ALONE, _CROWDED)], plan.repeats, measure)
    crowd_of = f"{total:,} connections, {slow:,} of them slow readers"
    goals = [Goal("at least", 0.95, _ALONE)]
    for unit, what in (("1/s", "warm manifest"), ("GB/s", f"warm blob of {megabytes} MiB, 8 clients")):
        yield Result("connections", f"{crowd_of}: {what}", unit, figures[unit], goals, ours=_CROWDED, notes=notes)
        notes = []
    # Later crowds find the memory that the first one needed.
    memory = {"memory of the worker": resident_kb[:1], "memory of the kernel": kernel_kb}
    for what, figure in memory.items():
        yield Result("connections", f"{crowd_of}: {what}", "kB a connection", {WAVE: figure})


def _affordable(total: int, slow: int) -> tuple[int, int, list[str]]:
    """So many connections of which so many read a file, or as many as a process may have here, with a note."""
    _, most = getrlimit(RLIMIT_NOFILE)
    room = most - _SPARE_FILES
    if total + slow <= room:
        return total, slow, []
    fewer = room * total // (total + slow), room * slow // (total + slow)
    return *fewer, [f"a process may open {most:,} files here (`ulimit -Hn`): {fewer[0]:,} connections, not {total:,}"]


# --- tokens ----------------------------------------------------------------------------------------------------------

_FEW = 1000
_CONNECTIONS = 8

# Copies the record of a token under others, that end with a number of 24 hex digits.
# Keys: the record. Arguments: what the copies' keys begin with; the first number; how many.
_COPY = """
for number = ARGV[2], ARGV[2] + ARGV[3] - 1 do
  redis.call('COPY', KEYS[1], ARGV[1] .. string.format('%024x', number))
end
"""
_COPIES_AT_ONCE = 10_000


@dataclass
class _Site:
    """A program with its Redis, and the tokens that were made there by copying one."""

    proxy: WaveProxy
    redis: RedisServer
    repository: str  # under /v2/, of the first token
    tag: str
    made: int = 0

    @property
    def _token(self) -> str:
        return self.repository.split("/")[1]

    def grow(self, count: int) -> None:
        """So many more tokens: real records, with the time that they have left."""
        with self.redis.client() as client:
            for first in range(self.made, self.made + count, _COPIES_AT_ONCE):
                some = min(_COPIES_AT_ONCE, self.made + count - first)
                client.eval(_COPY, 1, f"wave:token:{self._token}", f"wave:token:{self._token[:8]}", first, some)
        self.made += count

    def pull(self, numbers: Sequence[int]) -> float:
        """Get the manifest by each of these tokens, once; returns the seconds."""
        repository = self.repository.replace(self._token, f"{self._token[:8]}{{:024x}}")
        paths = [f"/v2/{repository.format(number)}/manifests/{self.tag}" for number in numbers]
        return ask_each(self.proxy.address, paths, _CONNECTIONS)


def tokens(plan: Plan) -> Iterator[Result]:
    """A pull by a token that the worker has not seen, among 1,000 and among 1,000,000; what a token costs."""
    many, touched = plan.choose(1_000_000, 100_000), plan.choose(100_000, 5_000)
    with ExitStack() as stack:
        made = stack.enter_context(stage(plan.folder / "stage", [small_image(1)], []))
        (sample,) = made.samples
        few, large = (_start(stack, plan, name, made.origin, sample) for name in ("few", "many"))
        few.grow(_FEW * plan.repeats)
        before = large.redis.used_memory()
        large.grow(many)
        bytes_a_token = (large.redis.used_memory() - before) / many
        yield from _costs(plan, {f"{_FEW:,} tokens": few, f"{many:,} tokens": large})
        yield Result("tokens", f"{many:,} tokens: record in Redis", "bytes a token", {WAVE: [bytes_a_token]})
        yield from _memory(large, touched)


def _start(stack: ExitStack, plan: Plan, name: str, origin: Origin, sample: Sample) -> _Site:
    redis = stack.enter_context(redis_that_may_die())
    config = '[cache]\ntag_ttl = "1h"\n'
    proxy = make_wave(plan.folder / name, origin=origin.address, config=config, redis=redis.url)
    stack.enter_context(running_wave(proxy))
    answer = proxy.submit(containerImage=origin.image_name(sample), containerConfig={"env": [ADDED_ENV]})
    repository, tag = split_image(answer["targetImage"])
    site = _Site(proxy, redis, repository, tag)
    site.grow(1)
    pull(proxy.address, repository, tag)  # what is upstream is known from here on
    return site


def _costs(plan: Plan, sites: Mapping[str, _Site]) -> Iterator[Result]:
    """What a pull costs in each of two places, by turns; each round takes tokens that were not asked for before."""
    peers = [
        Peer(name, site.proxy.address, lambda sample: sample.repository, site.proxy.workers)
        for name, site in sites.items()
    ]

    def measure(peer: Peer, round_: int) -> dict[str, float]:
        site, pids = sites[peer.name], peer.pids()
        step = (site.made - 1) // (_FEW * plan.repeats)
        numbers = range(1 + round_ * _FEW * step, 1 + (round_ + 1) * _FEW * step, step)
        before = processor_s(pids)
        duration_s = site.pull(numbers)
        return {"1/s": _FEW / duration_s, "µs": (processor_s(pids) - before) / _FEW * 1e6}

    figures = alternate(peers, plan.repeats, measure)
    few_name, large_name = sites
    work = "first pull by a token"
    goals = [Goal("at most", 1.1, few_name)]
    yield Result("tokens", work, "1/s", figures["1/s"], ours=large_name)
    yield Result("tokens", f"{work}: processor time of the worker", "µs", figures["µs"], goals, ours=large_name)


def _memory(site: _Site, touched: int) -> Iterator[Result]:
    site.grow(touched)  # of which none was asked for yet
    pids = site.proxy.workers()
    before, stored = resident(pids), site.redis.used_memory()
    site.pull(range(site.made - touched, site.made))
    work = f"{touched:,} tokens pulled once"
    figures = {"before": [before / MB], WAVE: [resident(pids) / MB]}
    yield Result("tokens", f"{work}: memory of the worker", "MB", figures)
    grown = (site.redis.used_memory() - stored) / touched
    yield Result("tokens", f"{work}: more in Redis than the record", "bytes a token", {WAVE: [grown]})

"""The whole program, set up to build: a registry with a base image, what holds builds, and what they leave behind."""

import asyncio
import re
from base64 import b64encode
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import which
from typing import Any

from bench.images import busybox_image, has_busybox
from tests.boxes import why_no_box
from tests.building.held import Doors, front_door, page
from tests.patience import PATIENCE_S, until
from tests.servers import WaveProxy, distribution, has_distribution, push, redis_server
from wave_proxy.image.build import BuildRecord
from wave_proxy.state.builds import BuildLimits, BuildStore
from wave_proxy.state.redis import connect


def why_no_builds() -> str:
    """Why nothing can be built on this machine; empty when it can."""
    if not which("buildah"):
        return "buildah is not installed (Debian package buildah)"
    if not has_distribution():
        return "docker-registry is not installed (Debian package docker-registry)"
    return why_no_box() if has_busybox() else "busybox is not installed (Debian package busybox-static)"


@dataclass
class Works:
    """A registry (``host:port``) with ``library/busybox``, and doors at which builds wait."""

    tmp: Path
    registry: str
    redis: str
    page: Doors
    target: Doors

    @property
    def data(self) -> Path:
        """The data folder of the program."""
        return self.tmp / "wave"

    @property
    def base(self) -> str:
        """The name of the base image."""
        return f"{self.registry}/library/busybox"

    def wait_at(self, name: str) -> str:
        """Close a door, and give the command of a ``RUN`` that waits there."""
        self.page.close(name)
        return f"busybox wget -q -O /dev/null http://{self.page.address}/{name}"

    def wave(
        self, name: str = "wave", *, upstreams: tuple[str, ...] = (), redis: str | None = None, **build: Any
    ) -> WaveProxy:
        """The program, not started; ``build`` are settings of ``[build]``."""
        told = {"allow_private": [self.page.address], **build}
        config = 'shutdown_grace = "15s"\n[upstream]\nidle_timeout = "10m"\n[build]\n' + "".join(
            f"{key} = {_toml(value)}\n" for key, value in told.items()
        )
        config += '[quota]\npull_anonymous = "off"\nbuild_anonymous = "off"\n'
        config += '[http]\ntrusted_proxies = ["127.0.0.1"]\n[log]\nrequests = "failed"\n'
        known = (self.registry, self.target.address, *upstreams)
        chosen = self.redis if redis is None else redis
        return WaveProxy(self.tmp / name, config=config, upstreams=known, redis=chosen)


def _toml(value: Any) -> str:
    return str(value) if isinstance(value, int | float) else repr(value)


@contextmanager
def open_works(tmp: Path) -> Iterator[Works]:
    """Everything but the program."""
    with ExitStack() as stack:
        registry = stack.enter_context(distribution(tmp))
        push(registry, "library/busybox", busybox_image(), "latest")
        redis = stack.enter_context(redis_server(tmp))
        yield Works(tmp, registry, redis, stack.enter_context(page()), stack.enter_context(front_door(registry)))


# --- speaking to the program -----------------------------------------------------------------------------------------


def order(wave: WaveProxy, text: str, address: str = "", **attributes: str) -> dict[str, Any]:
    """Ask for the image of a container file, as a client at that address; the answer."""
    body = {"containerFile": b64encode(text.encode()).decode(), **attributes}
    headers = {"X-Forwarded-For": address} if address else {}
    answer = wave.request("POST", "/v1alpha2/container", body=body, headers=headers)
    assert answer.status == 200, f"{answer.status} {answer.body!r}"
    document: dict[str, Any] = answer.json()
    return document


def log_of(wave: WaveProxy, build_id: str) -> str:
    """The log, as far as there is one."""
    answer = wave.request("GET", f"/v1alpha1/builds/{build_id}/logs")
    return answer.body.decode() if answer.status == 200 else ""


def wait_done(wave: WaveProxy, build_id: str, within_s: float = PATIENCE_S) -> dict[str, Any]:
    """The build's status when it has ended. Raises AssertionError with its log."""

    def ended() -> dict[str, Any] | None:
        status: dict[str, Any] = wave.request("GET", f"/v1alpha1/builds/{build_id}/status").json()
        return status if status["status"] == "COMPLETED" else None

    return until(ended, lambda: f"{build_id} does not end:\n{log_of(wave, build_id)}", within_s)


def builder_pids(wave: WaveProxy) -> set[int]:
    """The builder's process; none when it is just being started again."""
    # What a builder starts has its command line for an instant.
    return {
        pid
        for pid, title in wave.processes().items()
        if re.search(r" -m builder\b", title) and _parent(pid) == wave.pid
    }


def _parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None  # it has just ended


def read_state(url: str, read: Callable[[BuildStore], Any]) -> Any:
    """What an awaitable ``read`` brings of the state of builds."""

    async def run() -> Any:
        async with connect(url) as redis:
            return await read(BuildStore(redis, BuildLimits(1)))

    return asyncio.run(run())


def records_of(url: str, build_ids: list[str]) -> list[BuildRecord]:
    """The records of those builds."""

    async def read(store: BuildStore) -> list[BuildRecord]:
        found = [await store.find(build_id) for build_id in build_ids]
        return [record for record in found if record is not None]

    records: list[BuildRecord] = read_state(url, read)
    assert len(records) == len(build_ids)
    return records


# --- what is left of builds ------------------------------------------------------------------------------------------


def leftovers(data: Path, url: str, builders: Collection[int]) -> list[str]:
    """What the builds of a data folder have left behind: processes, folders, mounts, cgroups, and state in Redis.

    ``builders`` are the processes that have run them.
    """
    return [*_processes(data), *_folders(data), *_mounts(data), *_cgroups(builders), *asyncio.run(_state(url))]


def _processes(data: Path) -> Iterator[str]:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # A box has its workspace mounted; nothing else does.
            if f"{data}/builds/" in (folder / "mountinfo").read_text():
                yield f"process {folder.name} {(folder / 'cmdline').read_text()}"
        except OSError:
            continue  # it has just ended


def _folders(data: Path) -> Iterator[str]:
    if (data / "builds").is_dir():
        yield from (f"folder {folder}" for folder in (data / "builds").iterdir())


def _mounts(data: Path) -> Iterator[str]:
    yield from (f"mount {line}" for line in Path("/proc/self/mounts").read_text().splitlines() if str(data) in line)


def _cgroups(builders: Collection[int]) -> Iterator[str]:
    for folder in Path("/sys/fs/cgroup").glob("**/wave-proxy-build-*"):
        if folder.name.split("-")[3] in map(str, builders):
            yield f"cgroup {folder}"


async def _state(url: str) -> list[str]:
    found = []
    async with connect(url) as redis:
        length = await BuildStore(redis, BuildLimits(1)).queue_length()
        found += [f"queue {length}"] if length != (0, 0) else []
        for kind in ("spec", "log", "waiting", "reserved"):
            found += [name.decode() async for name in redis.scan_iter(f"wave:{{builds}}:{kind}:*")]
        found += [f"slots of {owner!r}" for owner in await redis.hgetall("wave:{builds}:running")]
        found += [f"turn of {owner!r}" for owner in await redis.zrange("wave:{builds}:turns", 0, -1)]
        if await redis.exists("wave:{builds}:ready"):
            found += [
                f"claims of {one['name']}" for one in await redis.xinfo_consumers("wave:{builds}:ready", "builders")
            ]
    return found

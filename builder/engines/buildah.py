"""Container files run by buildah on this machine, each in a box with storage of its own."""

import asyncio
import re
import shutil
from collections.abc import Mapping
from json import dumps
from pathlib import Path
from secrets import token_hex
from tempfile import mkdtemp
from urllib.parse import urlsplit

from builder.box import HOME, SECRET, SPARE_PROCESSES, Boxes, BoxUnavailable, Run
from builder.engines import EngineMissing, Job
from builder.engines.registries import gated_auth, registries_conf, translate_auth
from builder.failures import BuildFailed, classify, timed_out
from builder.gate import Gate, Writable
from builder.ids import IdsMissing, find_ids
from builder.limits import Limits, Meter, Tail
from wave_proxy.image.build import Compression
from wave_proxy.image.reference import parse_reference
from wave_proxy.upstream.credentials import Login

_LEAST_VERSION = (1, 28)
_TAIL_BYTES = 64 << 10
_IMAGE = "localhost/built"
_LAYOUT = "layout"
_LEVELS = {"gzip": (1, 9), "zstd": (1, 20)}  # what its compressors take
# Podman's, without MKNOD: where a box's root is the machine's, it must not make a disk of the machine.
_CAPABILITIES: tuple[str, ...] = ("CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "NET_BIND_SERVICE")
_CAPABILITIES += ("SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT")
_CONTAINERS_CONF = """\
[containers]
default_capabilities = {capabilities}
default_ulimits = []
default_sysctls = []
volumes = []
[engine]
cgroup_manager = "cgroupfs"
events_logger = "none"
"""


class Buildah:
    """Runs builds with buildah ≥ 1.28 in chroot isolation.

    ``proxy_url`` is wave-proxy as the builder reaches it, ``authority`` what the names of its own images begin with.
    Without a ``gate`` builds have the machine's network; ``variables`` tell them of the proxy that leads out of it.
    """

    def __init__(
        self,
        limits: Limits,
        gate: Gate | None,
        proxy_url: str,
        authority: str,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self._limits = limits
        self._boxes = Boxes(limits, gate, variables)
        self._has_gate = gate is not None
        self._authority = authority
        self._registry = gate.registry if gate else urlsplit(proxy_url).netloc
        self._driver = ""

    @property
    def registry(self) -> str:
        """``host:port`` under which a build sees wave-proxy."""
        return self._registry

    async def check(self) -> None:
        """Raises EngineMissing when this machine can't run builds: no buildah, an old one, no namespaces, no ids."""
        if shutil.which("buildah") is None:
            raise EngineMissing(
                "the engine buildah needs the program buildah: install the package buildah (Debian 12, Fedora, RHEL 9 "
                'and later have it), or set [build] engine = "buildkit" or "none"'
            )
        try:
            ids = find_ids()
        except IdsMissing as err:
            raise EngineMissing(str(err)) from err
        if ids.helpers and not (shutil.which("newuidmap") and shutil.which("newgidmap")):
            raise EngineMissing(
                "a builder that is not root needs newuidmap and newgidmap: install the package uidmap (shadow-utils), "
                "or run the builder as root"
            )
        check_version(await self._trial("buildah", "--version"))

    async def _trial(self, *argv: str) -> str:
        """What a program says in a box. Raises EngineMissing when it can't run there."""
        folder, said = Path(mkdtemp(prefix="wave-proxy-")), bytearray()
        try:
            status = await self._boxes.run(Run(argv, folder, Meter(said.extend, _TAIL_BYTES), {}))
        except (BoxUnavailable, BuildFailed) as err:
            raise EngineMissing(str(err)) from err
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, True)
        text = said.decode(errors="replace").strip()
        if status != 0:
            raise EngineMissing(f"{' '.join(argv)} ends with exit status {status} in a box: {text}")
        return text

    async def build(self, job: Job) -> Path:
        """The OCI image layout of the built image. Raises BuildFailed."""
        try:
            async with asyncio.timeout(job.spec.timeout_s):
                driver = await self._storage_driver(job.folder)
                writable = self._writable(job)
                logins = await asyncio.to_thread(self._logins, job, writable)
                await asyncio.to_thread(self._write_configuration, job, driver, bool(logins))
                tail = Tail(job.log)
                meter = Meter(tail.write, self._limits.log_bytes)
                for platform in job.spec.platforms:
                    command = self._build_command(job, platform, bool(logins))
                    await self._run(job, tail, meter, command, writable, logins)
                    await self._run(job, tail, meter, _push_command(job, platform))
        except TimeoutError:
            raise timed_out(job.spec.timeout_s) from None
        except BoxUnavailable as err:
            raise BuildFailed(str(err)) from err
        return job.folder / _LAYOUT

    def _writable(self, job: Job) -> Writable | None:
        """The cache, if it is one of ours behind the gate."""
        host, _, repository = job.spec.cache_repository.partition("/")
        is_ours = self._has_gate and bool(repository) and host == self._authority
        return Writable(repository, Login("build", token_hex(16))) if is_ours else None

    def _write_configuration(self, job: Job, driver: str, has_logins: bool) -> None:
        """All that buildah reads but logins is in the workspace, and nothing of the machine's."""
        folder = job.folder / "buildah"
        for path in (folder, job.folder / "tmp", job.folder / "run"):
            path.mkdir(mode=0o700, exist_ok=True)
        (folder / "policy.json").write_text(dumps({"default": [{"type": "insecureAcceptAnything"}]}))
        # Who may change his root gets out of that of his step, and reads what is in the box.
        capabilities = [name for name in _CAPABILITIES if name != "SYS_CHROOT" or not has_logins]
        (folder / "containers.conf").write_text(_CONTAINERS_CONF.format(capabilities=dumps(capabilities)))
        storage = {"driver": driver, "graphroot": str(HOME / "storage"), "runroot": str(HOME / "run")}
        lines = (f"{key} = {dumps(value)}\n" for key, value in storage.items())
        (folder / "storage.conf").write_text("[storage]\n" + "".join(lines))
        (folder / "registries.conf").write_text(registries_conf(job.base_images, self._insecure(job)))

    def _logins(self, job: Job, writable: Writable | None) -> str:
        """The logins that buildah needs, as it reads them; empty for none. The job's file goes: none is to be found
        in the box, since steps have ways to files outside of their root (``--mount=type=cache,id=../..`` is one).
        """
        text = '{"auths": {}}'
        if job.auth_file is not None:
            text = job.auth_file.read_text()
            job.auth_file.unlink()
        if self._has_gate:  # which knows our own
            return gated_auth(text, self._authority, {self._registry: writable.login} if writable else {})
        return translate_auth(text, {self._authority: self._registry}) if job.auth_file is not None else ""

    def _insecure(self, job: Job) -> tuple[str, ...]:
        cache = self._cache_repository(job)
        return (cache,) if cache.startswith(("127.", "localhost", "[::1]")) else ()

    def _cache_repository(self, job: Job) -> str:
        """The cache repository by the name under which a build reaches it."""
        host, slash, path = job.spec.cache_repository.partition("/")
        return f"{self._registry if host == self._authority else host}{slash}{path}"

    async def _run(
        self,
        job: Job,
        tail: Tail,
        meter: Meter,
        argv: list[str],
        writable: Writable | None = None,
        logins: str = "",
    ) -> None:
        environment = {
            "TMPDIR": str(HOME / "tmp"),
            "XDG_RUNTIME_DIR": str(HOME / "run"),
            "CONTAINERS_CONF": str(HOME / "buildah" / "containers.conf"),
            "CONTAINERS_REGISTRIES_CONF": str(HOME / "buildah" / "registries.conf"),
            "CONTAINERS_STORAGE_CONF": str(HOME / "buildah" / "storage.conf"),
            "BUILDAH_ISOLATION": "chroot",
            "_CONTAINERS_USERNS_CONFIGURED": "done",
        }
        cache = job.spec.cache_repository
        registry = parse_reference(cache).registry if cache and writable is None else ""
        status = await self._boxes.run(Run(argv, job.folder, meter, environment, writable, registry, logins))
        if status != 0:
            raise BuildFailed(classify(job.named(tail.text), status), status)

    def _build_command(self, job: Job, platform: str, has_logins: bool) -> list[str]:
        spec = job.spec
        command = ["buildah", "build", "--format", "oci", "--isolation", "chroot"]
        command += ["--network", "host", "--platform", platform, "--timestamp", str(spec.epoch)]
        command += ["--signature-policy", str(HOME / "buildah" / "policy.json")]
        command += ["--ulimit", f"nproc={self._limits.processes + SPARE_PROCESSES}", "--retry", "2"]
        if has_logins:
            command += ["--authfile", SECRET]
        if spec.cache_repository:
            cache = self._cache_repository(job)
            command += ["--layers", "--cache-from", cache, "--cache-to", cache]
        else:
            command += ["--layers=false"]
        return [*command, "--file", str(HOME / "Containerfile"), "--tag", _image(platform), str(HOME / "context")]

    async def _storage_driver(self, folder: Path) -> str:
        """The same for all builds: their workspaces are on one file system."""
        if not self._driver:
            self._driver = "overlay" if await self._has_overlay(folder) else "vfs"
        return self._driver

    async def _has_overlay(self, folder: Path) -> bool:
        """Whether the kernel lets a box stack folders of this file system; else each layer is a whole copy."""
        trial = folder / "trial"
        script = "mkdir l u w m && mount -t overlay -o lowerdir=l,upperdir=u,workdir=w overlay m && touch m/file"
        await asyncio.to_thread(trial.mkdir)
        try:
            return await self._boxes.run(Run(("sh", "-c", script), trial, Meter(_forget, _TAIL_BYTES), {})) == 0
        finally:
            await asyncio.to_thread(shutil.rmtree, trial, True)


def _image(platform: str) -> str:
    return f"{_IMAGE}:{platform.replace('/', '-')}"


def _push_command(job: Job, platform: str) -> list[str]:
    command = ["buildah", "push", "--quiet", "--format", "oci"]
    command += ["--signature-policy", str(HOME / "buildah" / "policy.json")]
    image = _image(platform)
    return [*command, *compression_options(job), image, f"oci:{HOME / _LAYOUT}:{image.rpartition(':')[2]}"]


def compression_options(job: Job) -> list[str]:
    """How ``buildah push`` is told to compress layers; says in the log what it can't do."""
    wanted: Compression = job.spec.compression
    mode = wanted.mode or "gzip"
    if mode == "estargz":
        job.log(b"compression estargz is not one of buildah's: the layers are compressed with gzip\n")
        mode = "gzip"
    options = ["--compression-format", mode]
    if wanted.level is not None:
        least, most = _LEVELS[mode]
        options += ["--compression-level", str(min(max(wanted.level, least), most))]
    return options


def check_version(said: str) -> None:
    """Raises EngineMissing for what ``buildah --version`` says of one that is too old."""
    match = re.search(r"version (\d+)\.(\d+)", said)
    if match is None or (int(match[1]), int(match[2])) < _LEAST_VERSION:
        raise EngineMissing(f"the engine buildah needs buildah 1.28 or later: this machine has {said!r}")


def _forget(_text: bytes) -> None:
    """Take a log that nobody reads."""

"""The program with all that the public API page's requests need: images, Conda channels and CRAN, on loopback.

The images have the names that they have in public: their registries are reached at one of the tests' own, and the
images themselves know where channels and packages are. So requests need no other words than they have on that page.
"""

import gzip
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from platform import machine
from shutil import copy
from subprocess import run
from typing import Any

from bench.images import Image, Layer, image, layer
from bench.upstream import Upstream
from tests.building.conda_channel import write_channels
from tests.building.cran import write_cran
from tests.building.files import file_server
from tests.building.images import r_extras, rootfs_layer
from tests.building.works import log_of, wait_done
from tests.servers import WaveProxy, distribution, push

BUILD_S = 600.0  # what takes longer hangs
MAMBA_IMAGES = ("mambaorg/micromamba:1.5.10-noble", "mambaorg/micromamba:2-amazon2023")
PIXI_IMAGE = "prefix-dev/pixi:0.59.0-noble"
R_IMAGE = "rocker/r-ver:4.4.1"
BASE_IMAGE = "library/ubuntu:24.04"

USER, PASSWORD = "user", "secret"
HTPASSWD = f"{USER}:$2y$04$cSIOXkV5cVUjymeJJ4gY0O4Okw1h57wlg4Vz6NQXjVMUvutr8t.vu\n"  # of that password
VAULT = "vault.test"  # a registry that wants a login for everything
PRIVATE_BASE = "team/base:1"

_PLATFORM = f"linux/{ {'x86_64': 'amd64', 'aarch64': 'arm64'}.get(machine(), machine()) }"
_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_CONDA_PROGRAM = Path(__file__).with_name("conda_program.py")


@dataclass(frozen=True)
class Scene:
    """The running program; addresses are ``host:port``.

    ``private`` is a registry to pull from with a login, ``vault`` where that is which is called ``VAULT`` in names.
    ``files`` is the folder of the server of channels.
    """

    wave: WaveProxy
    registry: str
    channels: str
    private: str
    vault: str
    files: Path

    def write_file(self, name: str, text: str) -> str:
        """Have a file served; gives its address."""
        (self.files / name).write_text(text)
        return f"http://{self.channels}/{name}"

    def built(self, answer: dict[str, Any]) -> dict[str, Any]:
        """The build's status when it has succeeded. Raises AssertionError with its log."""
        status = self.ended(answer)
        assert status["succeeded"] is True, log_of(self.wave, answer["buildId"])
        return status

    def ended(self, answer: dict[str, Any]) -> dict[str, Any]:
        """The build's status when it has ended."""
        return wait_done(self.wave, answer["buildId"], BUILD_S)

    def log(self, answer: dict[str, Any]) -> str:
        """The log of the build."""
        return log_of(self.wave, answer["buildId"])


@contextmanager
def open_scene(tmp: Path) -> Iterator[Scene]:
    """Start everything. Needs why_no_builds() and why_no_images() to be empty."""
    with ExitStack() as stack:
        places = {name: tmp / name for name in ("channels", "cran", "public", "vault")}
        for folder in places.values():
            folder.mkdir()
        write_channels(places["channels"])
        write_cran(places["cran"])
        _write_apt(places["cran"] / "debian")
        channels = stack.enter_context(file_server(places["channels"]))
        cran = stack.enter_context(file_server(places["cran"]))
        registry = stack.enter_context(distribution(places["public"]))
        vault = stack.enter_context(distribution(places["vault"], htpasswd=HTPASSWD))
        private = stack.enter_context(Upstream(auth="bearer", username=USER, password=PASSWORD))
        _push_images(registry, channels, cran)
        private.add(*_split(PRIVATE_BASE, image([_base()], platform=_PLATFORM, env=[_PATH])))
        config = _configuration(registry, vault, private.address, (channels, cran))
        wave = stack.enter_context(WaveProxy(tmp / "wave", config=config, upstreams=[registry]))
        yield Scene(wave, registry, channels, private.address, vault, places["channels"])


def _configuration(registry: str, vault: str, private: str, servers: Sequence[str]) -> str:
    tables = [f"[build]\nallow_private = {list(servers)!r}\nfailure_memory = 2\n"]
    tables += ['[quota]\npull_anonymous = "off"\nbuild_anonymous = "off"\n[log]\nrequests = "failed"\n']
    tables += [f'[registries."{host}"]\nendpoint = "http://{registry}"\n' for host in ("docker.io", "ghcr.io")]
    login = f'username = "{USER}"\npassword = "{PASSWORD}"\n'
    tables += [f'[registries."{VAULT}"]\nendpoint = "http://{vault}"\n{login}']
    tables += [f'[registries."{private}"]\ninsecure = true\nallow_private = true\n{login}']
    return "\n".join(tables)


# --- images ----------------------------------------------------------------------------------------------------------


def _base() -> Layer:
    return rootfs_layer("debian")


def _push_images(registry: str, channels: str, cran: str) -> None:
    conda = _conda_image(channels)
    for name in (*MAMBA_IMAGES, PIXI_IMAGE):
        push(registry, *_split(name, conda))
    push(registry, *_split(R_IMAGE, _r_image(cran)))
    push(registry, *_split(BASE_IMAGE, image([_base()], platform=_PLATFORM, env=[_PATH], cmd=["/bin/bash"])))


def _split(name: str, pushed: Image) -> tuple[str, Image, str]:
    repository, _, tag = name.rpartition(":")
    return repository, pushed, tag


def _conda_image(channels: str) -> Image:
    """With programs that stand in for micromamba and pixi; they look channels up by name at that address."""
    program, entry = _CONDA_PROGRAM.read_bytes(), '#!/bin/sh\nexec "$@"\n'
    programs = layer(
        {"usr/local/bin/micromamba": program, "usr/local/bin/pixi": program, "usr/local/bin/_entrypoint.sh": entry}
    )
    env = [_PATH, "MAMBA_ROOT_PREFIX=/opt/conda", "MAMBA_USER=mambauser", f"CONDA_CHANNEL_ALIAS=http://{channels}"]
    return image(
        [rootfs_layer("conda"), programs],
        platform=_PLATFORM,
        env=env,
        user="mambauser",
        entrypoint=["/usr/local/bin/_entrypoint.sh"],
        cmd=["/bin/bash"],
    )


def _r_image(cran: str) -> Image:
    """R that knows that address as its CRAN, and apt that knows it as its mirror."""
    profile = f'options(repos = c(CRAN = "http://{cran}"))\n'
    sources = f"deb [trusted=yes] http://{cran}/debian ./\n"
    own = layer({"etc/R/Rprofile.site": profile, "etc/apt/sources.list": sources})
    return image([rootfs_layer("r"), own], platform=_PLATFORM, env=[_PATH], cmd=["R"])


def _write_apt(folder: Path) -> None:
    """A folder that apt can install R's extra packages from."""
    folder.mkdir()
    stanzas = []
    for package in sorted(r_extras().glob("*.deb")):
        copy(package, folder)
        control = run(["dpkg-deb", "--field", package], check=True, capture_output=True, text=True).stdout.strip()
        digest = sha256(package.read_bytes()).hexdigest()
        stanzas.append(f"{control}\nFilename: ./{package.name}\nSize: {package.stat().st_size}\nSHA256: {digest}\n")
    (folder / "Packages.gz").write_bytes(gzip.compress("\n".join(stanzas).encode()))

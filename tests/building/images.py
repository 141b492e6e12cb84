"""Root filesystems for images that builds start from, made once from Debian's packages and kept between runs."""

import fcntl
import gzip
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT, Popen, run

from bench.images import Layer, digest_of
from wave_proxy.image.oci import OCI_LAYER

TIMEOUT_S = 1200.0  # making one root filesystem
NEEDED = {"debootstrap": "debootstrap", "unshare": "util-linux", "chroot": "coreutils", "tar": "tar"}
RATTLER = "py-rattler==0.28.0"

# Packages that the public API page's request for R asks apt for: they are kept beside the root filesystem.
R_EXTRAS = "littler r-cran-docopt"

# In all scripts, `root` is the root filesystem. Mounts are seen by the script alone, and end with it.
_IN_ROOT = """
mount --bind /dev root/dev
mount -t proc proc root/proc
cp -L /etc/resolv.conf root/etc/resolv.conf
export DEBIAN_FRONTEND=noninteractive
install() { chroot root apt-get install -y -qq --no-install-recommends "$@"; }
"""
_UPDATE = "chroot root apt-get update -qq\n"
_TRIM = """
chroot root apt-get clean
rm -rf root/usr/share/doc/* root/usr/share/man/* root/usr/share/locale/* root/usr/share/info/*
rm -rf root/var/lib/apt/lists/* root/var/cache/apt/* root/var/cache/debconf/*-old root/var/log/* root/tmp/*
"""
_SCRIPTS: Mapping[str, tuple[str, str]] = {  # name to the one that it begins with, and its script
    "debian": (
        "",
        """debootstrap --variant=minbase --components="$COMPONENTS" "$SUITE" root "$MIRROR"
printf 'path-exclude=%s\\n' '/usr/share/doc/*' '/usr/share/man/*' '/usr/share/locale/*' >root/etc/dpkg/dpkg.cfg.d/small
echo force-unsafe-io >>root/etc/dpkg/dpkg.cfg.d/small
"""
        + _IN_ROOT,
    ),
    "conda": (
        "debian",
        _IN_ROOT
        + _UPDATE
        + f"""install python3 python3-yaml ca-certificates
site=$(chroot root python3 -c 'import site; print(site.getsitepackages()[0])')
version=$(chroot root python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
"$PYTHON" -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-compile \\
    --only-binary=:all: --python-version="$version" --target="root$site" {RATTLER}
chroot root useradd --create-home --uid 57439 mambauser
chroot root install -d -o mambauser -g mambauser /opt/conda
""",
    ),
    "r": (
        "debian",
        _IN_ROOT
        + _UPDATE
        + f"""install r-base-core
chroot root apt-get install -y -qq --no-install-recommends --download-only {R_EXTRAS}
mkdir kept
mv root/var/cache/apt/archives/*.deb kept
""",
    ),
}


@dataclass(frozen=True)
class Mirror:
    """Where this machine gets its own release of Debian (or of what is like it) from."""

    url: str
    suite: str
    components: str


def why_no_images() -> str:
    """Why no root filesystem can be made here; empty when they can."""
    if os.geteuid() != 0:
        return "only root can make root filesystems"
    missing = [f"{program} (Debian package {package})" for program, package in NEEDED.items() if not _find(program)]
    if missing:
        return f"not installed: {', '.join(missing)}"
    if find_spec("pip") is None:
        return "this Python has no pip"
    return "" if _mirror() else "no mirror of this machine's own release is in /etc/apt"


def _find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")


@cache
def _mirror() -> Mirror | None:
    suite = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    files = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    for file in files:
        text = file.read_text() if file.is_file() else ""
        for mirror in _deb822(text) if file.suffix == ".sources" else _one_line(text):
            if mirror.suite == suite and "main" in mirror.components:
                return mirror
    return None


def _one_line(text: str) -> Iterator[Mirror]:
    for found in re.finditer(r"^deb\s+(?:\[[^]]*\]\s+)?(\S+)\s+(\S+)\s+(.+)$", text, re.MULTILINE):
        yield Mirror(found[1], found[2], ",".join(found[3].split()))


def _deb822(text: str) -> Iterator[Mirror]:
    for stanza in re.split(r"\n\s*\n", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)):
        fields = {name: value.split() for name, value in re.findall(r"^([\w-]+):(.*)$", stanza, re.MULTILINE)}
        if "deb" in fields.get("Types", ()):
            for suite in fields.get("Suites", ()):
                yield Mirror(fields["URIs"][0], suite, ",".join(fields.get("Components", ())))


# --- making them -----------------------------------------------------------------------------------------------------


def rootfs_layer(name: str) -> Layer:
    """A root filesystem as one layer: ``debian``, or that with ``conda`` (Python and rattler) or ``r``.

    Needs why_no_images() to be empty. Raises AssertionError with what was printed when it can't be made.
    """
    folder = _made(name)
    content = (folder / "layer.tar.gz").read_bytes()
    return Layer(digest_of(content), content, OCI_LAYER, (folder / "diff_id").read_text())


def r_extras() -> Path:
    """The folder of the Debian packages of ``R_EXTRAS``, with those that they depend on and ``r`` lacks."""
    return _made("r") / "kept"


def _made(name: str) -> Path:
    """The folder of a finished root filesystem, after it was made, if need be."""
    cached = _cache_folder()
    folder = cached / f"{name}-{_key(name)}"
    with _lock(cached / f"{name}.lock"):
        if not folder.is_dir():
            unfinished = cached / f"{name}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)  # of one that was killed
            try:
                _make(name, unfinished)
                unfinished.rename(folder)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _cache_folder() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wave-proxy-tests"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _key(name: str) -> str:
    """What tells root filesystems of other recipes and releases apart."""
    base, script = _SCRIPTS[name]
    parts = (_key(base) if base else "", script, _TRIM, repr(_mirror()), platform.machine())
    return sha256("\0".join(parts).encode()).hexdigest()[:16]


@contextmanager
def _lock(file: Path) -> Iterator[None]:
    with file.open("w") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield


def _make(name: str, folder: Path) -> None:
    base, script = _SCRIPTS[name]
    (folder / "root").mkdir(parents=True)
    if base:
        archive = _made(base) / "layer.tar.gz"
        run(["tar", "-xzf", archive, "--numeric-owner", "-C", folder / "root"], check=True, timeout=TIMEOUT_S)
    mirror = _mirror()
    assert mirror is not None
    names = {"MIRROR": mirror.url, "SUITE": mirror.suite, "COMPONENTS": mirror.components, "PYTHON": sys.executable}
    env = {**os.environ, **names, "PATH": f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin", "LC_ALL": "C"}
    env.pop("TMPDIR", None)  # there is none of that name in the root filesystem
    finished = run(
        ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-euc", script + _TRIM],
        cwd=folder,
        env=env,
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=STDOUT,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert finished.returncode == 0, f"{name}: {finished.stdout.decode(errors='replace')[-3000:]}"
    (folder / "diff_id").write_text(_pack(folder / "root", folder / "layer.tar.gz"))
    shutil.rmtree(folder / "root")


def _pack(root: Path, archive: Path) -> str:
    """Write a root filesystem as a layer; returns its diff_id."""
    shutil.rmtree(root / "dev")  # whoever runs the image mounts one; in a box, devices can't be made
    (root / "dev").mkdir()
    digest = sha256()
    command = ["tar", "--numeric-owner", "-c", *sorted(os.listdir(root))]
    with Popen(command, cwd=root, stdout=PIPE) as tar, gzip.open(archive, "wb", compresslevel=1) as packed:
        assert tar.stdout is not None
        while chunk := tar.stdout.read(1 << 20):
            digest.update(chunk)
            packed.write(chunk)
    assert tar.returncode == 0
    return f"sha256:{digest.hexdigest()}"

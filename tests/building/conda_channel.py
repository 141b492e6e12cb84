"""Conda channels of small packages: shell scripts that say their name, with real metadata to give a solver work."""

import json
from bz2 import compress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import md5, sha256
from io import BytesIO
from pathlib import Path
from platform import machine
from tarfile import TarFile, TarInfo
from typing import Any

SUBDIR = {"x86_64": "linux-64", "aarch64": "linux-aarch64"}.get(machine(), f"linux-{machine()}")
PREFIX = "/opt/prefix-that-the-installer-replaces"
TIMESTAMP_MS = 1_704_067_200_000


@dataclass(frozen=True)
class Package:
    """A package with one program, ``bin/<name>``, that prints ``<name> <version>``."""

    name: str
    version: str
    depends: tuple[str, ...] = ()
    noarch: bool = False

    @property
    def subdir(self) -> str:
        """The folder of the channel that it is in."""
        return "noarch" if self.noarch else SUBDIR

    @property
    def file_name(self) -> str:
        """The name of its archive."""
        return f"{self.name}-{self.version}-0.tar.bz2"


CHANNELS: Mapping[str, tuple[Package, ...]] = {
    "conda-forge": (
        Package("libzlib", "1.2.13"),
        Package("libzlib", "1.3.1"),
        Package("libboost", "1.78.0", ("libzlib >=1.2,<2",)),
        Package("libboost", "1.86.0", ("libzlib >=1.3,<2",)),
        Package("tzdata", "2025a", noarch=True),
        Package("python", "3.12.8", ("libzlib >=1.2", "tzdata")),
        Package("numpy", "1.26.4", ("python >=3.12",)),
        Package("numpy", "2.2.1", ("python >=3.12",)),
        Package("scipy", "1.14.1", ("numpy >=1.26,<2.3",)),
        Package("pandas", "2.2.3", ("numpy >=1.26", "tzdata")),
        Package("scikit-learn", "1.5.2", ("numpy >=1.26,<2.2", "scipy >=1.6")),
        Package("procps-ng", "3.3.17"),
        Package("procps-ng", "4.0.4"),
        Package("which", "2.21"),
        Package("gpu-tool", "1.0", ("__cuda >=12",)),
    ),
    "bioconda": (
        Package("bwa", "0.7.15", ("libzlib",)),
        Package("bwa", "0.7.17", ("libzlib",)),
        Package("bwa", "0.7.18", ("libzlib >=1.3",)),
        Package("salmon", "1.10.0", ("libboost >=1.78,<1.79",)),
        Package("salmon", "1.10.3", ("libboost >=1.86,<1.87",)),
        Package("htslib", "1.17", ("libzlib",)),
        Package("htslib", "1.21", ("libzlib >=1.3",)),
        Package("samtools", "1.17", ("htslib >=1.17,<1.18",)),
        Package("samtools", "1.21", ("htslib >=1.21,<1.22",)),
        Package("multiqc", "1.25", noarch=True),
        Package("old-boost-tool", "1.0", ("libboost <1.80",)),  # with it, only the older salmon will do
        Package("unsatisfiable", "1.0", ("never-released >=1",)),
    ),
}


def write_channels(folder: Path) -> None:
    """Write each channel into a folder of its name, with its index."""
    for name, packages in CHANNELS.items():
        for subdir in (SUBDIR, "noarch"):
            _write_subdir(folder / name / subdir, [package for package in packages if package.subdir == subdir])


def _write_subdir(folder: Path, packages: Iterable[Package]) -> None:
    folder.mkdir(parents=True)
    records = {package.file_name: _write_package(folder, package) for package in packages}
    index = {"info": {"subdir": folder.name}, "packages": records, "packages.conda": {}, "repodata_version": 1}
    (folder / "repodata.json").write_text(json.dumps(index))


def _write_package(folder: Path, package: Package) -> dict[str, Any]:
    """Write its archive; returns its record for the index."""
    archive = _archive(package)
    (folder / package.file_name).write_bytes(archive)
    # Conda's format has an md5 in every record; it protects nothing here.
    digests = {"md5": md5(archive, usedforsecurity=False).hexdigest(), "sha256": sha256(archive).hexdigest()}
    return {**_index(package), **digests, "size": len(archive)}


def _index(package: Package) -> dict[str, Any]:
    index = {"name": package.name, "version": package.version, "build": "0", "build_number": 0}
    index |= {"depends": list(package.depends), "subdir": package.subdir, "timestamp": TIMESTAMP_MS}
    if package.noarch:
        return {**index, "noarch": "generic"}
    return {**index, "platform": "linux", "arch": machine()}


def _archive(package: Package) -> bytes:
    says = f"share/{package.name}/says"
    # The program finds its data only where the installer said that it is: the prefix must be right in the final image.
    files = {
        f"bin/{package.name}": f"#!/bin/sh\nexec cat {PREFIX}/{says}\n",
        says: f"{package.name} {package.version}\n",
    }
    paths = [_path(name, content) for name, content in files.items()]
    about = {
        "info/index.json": json.dumps(_index(package)),
        "info/paths.json": json.dumps({"paths": paths, "paths_version": 1}),
        "info/files": "".join(f"{name}\n" for name in files),
        "info/about.json": "{}",
    }
    buffer = BytesIO()
    with TarFile(fileobj=buffer, mode="w") as tar:
        for name, content in {**about, **files}.items():
            info = TarInfo(name)
            info.size, info.mode = len(content), 0o755 if name.startswith("bin/") else 0o644
            tar.addfile(info, BytesIO(content.encode()))
    return compress(buffer.getvalue())


def _path(name: str, content: str) -> dict[str, Any]:
    size, digest = len(content), sha256(content.encode()).hexdigest()
    path = {"_path": name, "path_type": "hardlink", "sha256": digest, "size_in_bytes": size}
    return {**path, "prefix_placeholder": PREFIX, "file_mode": "text"} if PREFIX in content else path

"""A CRAN-like folder of small source packages without anything to compile."""

from collections.abc import Mapping
from gzip import compress
from hashlib import md5
from io import BytesIO
from pathlib import Path
from tarfile import TarFile, TarInfo

# Name to version and what it imports. BiocManager installs from the same folder.
PACKAGES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "BiocManager": ("1.30.25", ()),
    "dplyr": ("1.1.4", ("rlang",)),
    "ggplot2": ("3.5.1", ("rlang",)),
    "limma": ("3.60.0", ()),
    "rlang": ("1.1.4", ()),
}
_SAYS = "says <- function() cat('{name}', '{version}', '\\n')\n"
_INSTALL = "install <- function(pkgs, ...) utils::install.packages(pkgs, repos = getOption('repos')['CRAN'])\n"


def write_cran(folder: Path) -> None:
    """Write ``src/contrib`` with the packages and their index."""
    contrib = folder / "src" / "contrib"
    contrib.mkdir(parents=True)
    index = []
    for name in PACKAGES:
        archive = _archive(name)
        (contrib / f"{name}_{PACKAGES[name][0]}.tar.gz").write_bytes(archive)
        # CRAN's index has an md5; it protects nothing here.
        index.append(f"{_description(name)}MD5sum: {md5(archive, usedforsecurity=False).hexdigest()}\n")
    (contrib / "PACKAGES").write_text("\n".join(index))


def _description(name: str) -> str:
    version, imports = PACKAGES[name]
    lines = [f"Package: {name}", f"Version: {version}", "License: GPL-3", "NeedsCompilation: no"]
    if imports:
        lines.append(f"Imports: {', '.join(imports)}")
    return "".join(f"{line}\n" for line in lines)


def _archive(name: str) -> bytes:
    version, _ = PACKAGES[name]
    code, exported = _SAYS.format(name=name, version=version), ["says"]
    if name == "BiocManager":
        code, exported = code + _INSTALL, [*exported, "install"]
    about = (
        f"{_description(name)}Title: Small\nDescription: Small.\nAuthor: Nobody\nMaintainer: Nobody <n@example.org>\n"
    )
    files = {
        "DESCRIPTION": about,
        "NAMESPACE": "".join(f"export({function})\n" for function in exported),
        f"R/{name}.R": code,
    }
    buffer = BytesIO()
    with TarFile(fileobj=buffer, mode="w") as tar:
        for path, content in files.items():
            info = TarInfo(f"{name}/{path}")
            info.size = len(content)
            tar.addfile(info, BytesIO(content.encode()))
    return compress(buffer.getvalue(), mtime=0)

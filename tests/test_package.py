"""The source distribution and the wheel are complete, and work outside of the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MADE = shutil.ignore_patterns(
    ".git",
    ".venv",
    ".*_cache",
    ".hypothesis",
    ".benchmarks",
    "__pycache__",
    "wave-data",
    "build",
    "dist",
    "*.egg-info",
    "*.so",
    "*.c",
)


@dataclass(frozen=True)
class Built:
    """A copy of the checkout, its sdist, the wheel built from that, and an environment that has only the wheel."""

    source: Path
    sdist: Path
    wheel: Path
    bin: Path

    def run(self, *command: str) -> str:
        """Standard output of a command, run in a folder that holds nothing of ours."""
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
        program = [str(self.bin / command[0]), *command[1:]]
        done = subprocess.run(
            program, cwd=self.bin, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    folder = tmp_path_factory.mktemp("package")
    source = shutil.copytree(ROOT, folder / "source", ignore=MADE)
    _python("-m", "build", "--outdir", str(folder / "dist"), str(source))
    (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    yield Built(source, sdist, wheel, _install(wheel, folder / "installed"))
    shutil.rmtree(folder)


def _install(wheel: Path, folder: Path) -> Path:
    """A new environment's bin folder. It has the wheel; its dependencies are those of the tests' environment."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    _python("-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel))
    paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    ours = {sysconfig.get_paths()[name] for name in ("purelib", "platlib")}
    (Path(paths["purelib"]) / "dependencies.pth").write_text("\n".join(ours))
    return python.parent


def _python(*arguments: str) -> None:
    done = subprocess.run([sys.executable, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"


def test_the_source_distribution_is_complete(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for package in ("wave_proxy", "api", "builder", "tests", "bench", "scripts", "docs", ".ci"):
        files = [file for file in (built.source / package).rglob("*") if file.is_file()]
        wanted = {str(file.relative_to(built.source)) for file in files if not _is_made(file)}
        assert wanted
        assert wanted <= names
    assert {"LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "setup.py"} <= names
    assert not [name for name in names if name.endswith((".c", ".so", ".pyc"))]


def _is_made(file: Path) -> bool:
    return file.suffix in (".c", ".so", ".pyc") or "__pycache__" in file.parts


def test_the_wheel_is_complete(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        names = set(archive.namelist())
    modules = {
        str(file.relative_to(built.source))
        for package in ("wave_proxy", "api", "builder")
        for file in _sources(built.source / package)
    }
    assert modules <= names
    assert "wave_proxy/py.typed" in names
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    kernels = {
        str(file.relative_to(built.source).with_suffix(suffix))
        for file in (built.source / "wave_proxy/_fast").glob("*.pyx")
    }
    assert kernels
    assert kernels <= names
    assert not [name for name in names if name.startswith(("tests/", "bench/", "scripts/"))]


def _sources(package: Path) -> list[Path]:
    return [
        file
        for suffix in ("*.py", "*.pyi", "*.pyx", "*.j2", "*.html", "*.css", "*.js")
        for file in package.rglob(suffix)
    ]


def test_the_installed_program_knows_its_version(built: Built) -> None:
    version = built.wheel.name.split("-")[1]
    assert version in built.run("wave-proxy", "version").split()
    assert version in built.run("python", "-m", "wave_proxy", "version").split()


def test_the_installed_modules_are_the_wheels(built: Built) -> None:
    program = "import api, builder, wave_proxy._fast.digest as d; print(api.__file__, builder.__file__, d.__file__)"
    folders = {Path(path).is_relative_to(built.bin.parent) for path in built.run("python", "-c", program).split()}
    assert folders == {True}

"""The registries and the program, started once a file: the first pull of each image is a cold one for every client."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.clients.scene import Scene, Source, open_sources
from tests.servers import WaveProxy


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, Source], str]]:
    """The images by kind, and the program's configuration for their registries."""
    with open_sources(tmp_path_factory.mktemp("registry")) as opened:
        yield opened


@pytest.fixture(scope="module")
def scene(sources: tuple[dict[str, Source], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """The running program in front of them."""
    found, config = sources
    with WaveProxy(tmp_path_factory.mktemp("wave") / "data", workers=2, config=config) as wave:
        yield Scene(wave, found)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A name for a folder that a client shall make; it goes with the test, for there are many."""
    with TemporaryDirectory(prefix="image-") as name:
        yield Path(name) / "image"

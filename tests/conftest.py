"""Factories of servers; each server is started when it is asked for and stopped at the end of the test."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from bench.upstream import Upstream
from tests.servers import WaveProxy, redis_server

# A busy machine makes an example slow, not wrong; a failure prints how to repeat it.
settings.register_profile("ours", deadline=None, print_blob=True)
settings.load_profile("ours")


@pytest.fixture
def upstream() -> Iterator[Callable[..., Upstream]]:
    """``upstream(**arguments)`` starts a registry to pull from."""
    with ExitStack() as stack:
        yield lambda **arguments: stack.enter_context(Upstream(**arguments))


@pytest.fixture
def wave(tmp_path: Path) -> Iterator[Callable[..., WaveProxy]]:
    """``wave(**arguments)`` starts the program on an empty data folder (or on ``data``)."""
    with ExitStack() as stack:
        started: list[WaveProxy] = []

        def start(**arguments: Any) -> WaveProxy:
            data = arguments.pop("data", None) or tmp_path / f"wave-{len(started)}"
            started.append(stack.enter_context(WaveProxy(data, **arguments)))
            return started[-1]

        yield start


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    """The address of an empty Redis."""
    with redis_server(tmp_path) as url:
        yield url

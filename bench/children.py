"""Processes of clients: what they do shall not wait for the one that measures."""

import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection as Pipe
from typing import Any


@contextmanager
def child(target: Callable[..., None], *arguments: Any) -> Iterator[Pipe]:
    """A process that runs ``target(pipe, *arguments)``; gives the other end of its pipe, and is killed at the end."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
    # Ctrl-C goes to all processes of a terminal: this one leaves it to the one that started it.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, before)
    theirs.close()
    try:
        yield ours
    finally:
        process.kill()
        process.join()
        process.close()
        ours.close()


def raise_file_limit() -> int:
    """Open as many files as the system lets this process; returns how many that is."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return most

"""How a process that answers requests begins: with as many files as it may open, and by saying that it answers."""

import os
import resource


def raise_file_limit() -> None:
    """Take the number of open files that the system would give us: a connection is one, and some are two."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def say_ready() -> None:
    """Tell the supervisor, when there is one, that this process now answers: a line on a pipe that it was given."""
    fd, name = os.environ.get("WAVE_READY_FD"), os.environ.get("WAVE_PART")
    if fd is not None and name is not None:
        os.write(int(fd), f"{name}\n".encode())
        os.close(int(fd))

"""How a child process tells the supervisor that it answers: a line on a pipe that it was given."""

import os


def say_ready() -> None:
    """Tell the supervisor, when there is one, that this process now answers."""
    fd, name = os.environ.get("WAVE_READY_FD"), os.environ.get("WAVE_PART")
    if fd is not None and name is not None:
        os.write(int(fd), f"{name}\n".encode())
        os.close(int(fd))

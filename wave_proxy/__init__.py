"""Container registry proxy: the pull path, its state, and the command line."""

__version__ = "0.1.0"

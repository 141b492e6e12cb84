"""A stand-in for the Seqera Platform: a program of its own (``python -m tests.platform``), from the wire facts."""

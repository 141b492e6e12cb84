"""Unmodified container clients pull through the running program."""

"""Tests: real sockets, real processes, real images."""

# cython: boundscheck=False, wraparound=False, auto_pickle=False, autotestdict=False
"""Streaming digest verification: see digest.pyi."""

cimport cython

from hashlib import new as _new

from wave_proxy.errors import DigestMismatch, SizeMismatch


@cython.final
cdef class Verifier:
    cdef object _hash
    cdef object _update
    cdef str _digest
    cdef readonly long long size
    cdef long long _limit

    def __init__(self, str digest not None, long long size=-1):
        self._hash = _new(digest.partition(":")[0])
        self._update = self._hash.update
        self._digest = digest
        self._limit = size
        self.size = 0

    def update(self, bytes chunk not None):
        cdef long long size = self.size + len(chunk)
        if self._limit >= 0 and size > self._limit:
            raise SizeMismatch(f"more than the {self._limit} bytes announced for {self._digest}")
        self._update(chunk)
        self.size = size

    def finish(self):
        if self._limit >= 0 and self.size != self._limit:
            raise SizeMismatch(f"{self.size} of the {self._limit} bytes announced for {self._digest}")
        cdef str found = f"{self._digest.partition(':')[0]}:{self._hash.hexdigest()}"
        if found != self._digest:
            raise DigestMismatch(f"expected {self._digest} and got {found}")

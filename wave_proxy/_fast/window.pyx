# cython: boundscheck=False, wraparound=False, auto_pickle=False, autotestdict=False
"""Permits on lease, uses to report, refusals to remember: see window.pyi."""

cimport cython


@cython.final
cdef class Ledger:
    cdef double _quantum_s
    cdef double _window_s
    cdef readonly long long unused
    cdef readonly double deadline
    cdef double _first       # use in the quantum that is being counted
    cdef double _last
    cdef long long _count
    cdef list _uses
    cdef list _frees
    cdef double _refused_until

    def __init__(self, double quantum_s, double window_s):
        self._quantum_s = quantum_s
        self._window_s = window_s
        self.unused = 0
        self.deadline = 0.0
        self._first = self._last = 0.0
        self._count = 0
        self._uses = []
        self._frees = []
        self._refused_until = 0.0

    def take(self, double now):
        if self.unused <= 0 or now >= self.deadline:
            return False
        self.unused -= 1
        self._note(now)
        return True

    def record(self, double now):
        self._note(now)

    cdef int _note(self, double now) except -1:
        if self._count > 0 and now - self._first < self._quantum_s:
            self._count += 1
            self._last = max(self._last, now)
            return 0
        self._flush()
        while self._uses and <double>(<tuple>self._uses[0])[0] <= now - self._window_s:
            del self._uses[0]
        self._first = self._last = now
        self._count = 1
        return 0

    cdef int _flush(self) except -1:
        if self._count > 0:
            self._uses.append((self._last, self._count))
            self._count = 0
        return 0

    def settle(self):
        self._flush()
        cdef list uses = self._uses
        self._uses = []
        self.unused = 0
        return uses

    def grant(self, long long permits, double deadline, list frees not None):
        cdef double refused_until = 0.0
        if frees:
            refused_until, _ = frees[0]
        self._refused_until = refused_until
        self._frees = frees
        self.unused = permits
        self.deadline = deadline

    def delay(self, double now, long long position):
        # What we hold ourselves, past the lease's end, comes back with the next question.
        if self.unused > 0 or now >= self._refused_until:
            return 0.0
        cdef double instant = self._refused_until
        cdef long long count
        for instant, count in self._frees:
            position -= count
            if position < 0:
                break
        return instant - now

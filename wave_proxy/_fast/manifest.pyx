# cython: boundscheck=False, wraparound=False, auto_pickle=False, autotestdict=False
"""Edits of JSON text in place, byte for byte elsewhere: see manifest.pyi.

Offsets into the document, never pointers, cross function borders; every read is guarded by the document's length.
"""

from json import dumps as _dumps, loads as _loads

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.string cimport memchr, memcmp


cdef struct Member:
    Py_ssize_t start      # of the value; -1 when the container has no such member
    Py_ssize_t end
    Py_ssize_t close      # of the container's closing bracket
    bint empty            # whether the container has no member at all


cdef inline Py_ssize_t _skip_space(const char* s, Py_ssize_t i, Py_ssize_t n) noexcept nogil:
    while i < n and (s[i] == c' ' or s[i] == c'\n' or s[i] == c'\t' or s[i] == c'\r'):
        i += 1
    return i


cdef Py_ssize_t _skip_string(const char* s, Py_ssize_t i, Py_ssize_t n) except -1:
    i += 1
    while i < n:
        if s[i] == c'"':
            return i + 1
        i += 2 if s[i] == c'\\' else 1
    raise ValueError("unterminated string")


cdef Py_ssize_t _skip_value(const char* s, Py_ssize_t i, Py_ssize_t n) except -1:
    cdef Py_ssize_t depth = 0
    cdef char c
    while i < n:
        c = s[i]
        if c == c'"':
            i = _skip_string(s, i, n)
        elif c == c'{' or c == c'[':
            depth += 1
            i += 1
            continue
        elif c == c'}' or c == c']':
            depth -= 1
            if depth < 0:
                raise ValueError("unbalanced bracket")
            i += 1
        elif c == c',' or c == c':' or c == c' ' or c == c'\n' or c == c'\t' or c == c'\r':
            if depth == 0:
                raise ValueError("value missing")
            i += 1
            continue
        else:
            while i < n and not (s[i] == c',' or s[i] == c']' or s[i] == c'}' or s[i] == c' ' or s[i] == c'\n'
                                 or s[i] == c'\t' or s[i] == c'\r' or s[i] == c':'):
                i += 1
        if depth == 0:
            return i
    raise ValueError("unexpected end")


cdef bint _is_key(const char* s, Py_ssize_t start, Py_ssize_t end, bytes key) except -1:
    """Whether the key between the quotes at ``start`` and ``end`` reads as ``key`` (UTF-8)."""
    if memchr(s + start, c'\\', end - start) != NULL:
        return _loads(s[start - 1:end + 1]) == key.decode()
    return end - start == PyBytes_GET_SIZE(key) and memcmp(s + start, PyBytes_AS_STRING(key), end - start) == 0


cdef Member _find(const char* s, Py_ssize_t i, Py_ssize_t n, object step) except *:
    """The member ``step`` (key or position) of the container that starts at ``i``; of equal keys, the last."""
    cdef Member found = Member(-1, -1, -1, True)
    cdef bint keyed = isinstance(step, str)
    cdef bytes key = step.encode() if keyed else b""
    cdef Py_ssize_t wanted = -1 if keyed else step
    cdef Py_ssize_t position = 0, start, key_start = 0, key_end = 0
    cdef char closing = c'}' if keyed else c']'
    if i >= n or s[i] != (c'{' if keyed else c'['):
        raise ValueError(f"no {'object' if keyed else 'array'} around {step!r}")
    i = _skip_space(s, i + 1, n)
    if i < n and s[i] == closing:
        found.close = i
        return found
    found.empty = False
    while i < n:
        if keyed:
            if s[i] != c'"':
                raise ValueError("key missing")
            key_start = i + 1
            i = _skip_string(s, i, n)
            key_end = i - 1
            i = _skip_space(s, i, n)
            if i >= n or s[i] != c':':
                raise ValueError("colon missing")
            i = _skip_space(s, i + 1, n)
        start = i
        i = _skip_value(s, i, n)
        if _is_key(s, key_start, key_end, key) if keyed else position == wanted:
            found.start, found.end = start, i
        position += 1
        i = _skip_space(s, i, n)
        if i < n and s[i] == closing:
            found.close = i
            return found
        if i >= n or s[i] != c',':
            raise ValueError("comma missing")
        i = _skip_space(s, i + 1, n)
    raise ValueError("unexpected end")


cdef Member _walk(const char* s, Py_ssize_t n, tuple path) except *:
    cdef Py_ssize_t i = _skip_space(s, 0, n)
    cdef Member member = Member(-1, -1, -1, True)
    cdef Py_ssize_t last = len(path) - 1, depth
    if last < 0:
        raise ValueError("empty path")
    for depth in range(last + 1):
        member = _find(s, i, n, path[depth])
        if member.start < 0 and (depth < last or not isinstance(path[depth], str)):
            raise ValueError(f"no member {path[depth]!r}")
        i = member.start
    return member


cdef bytes _insert(bytes document, Member member, tuple path, bytes value):
    cdef str key = path[len(path) - 1]
    cdef bytes quoted = _dumps(key).encode() + b":"
    return document[:member.close] + (b"" if member.empty else b",") + quoted + value + document[member.close:]


def set_member(bytes document not None, tuple path not None, bytes value not None):
    cdef Member member = _walk(PyBytes_AS_STRING(document), PyBytes_GET_SIZE(document), path)
    if member.start < 0:
        return _insert(document, member, path, value)
    return document[:member.start] + value + document[member.end:]


def append_items(bytes document not None, tuple path not None, bytes items not None):
    cdef const char* s = PyBytes_AS_STRING(document)
    cdef Py_ssize_t n = PyBytes_GET_SIZE(document)
    cdef Member member = _walk(s, n, path)
    if member.start < 0:
        return _insert(document, member, path, b"[" + items + b"]")
    if document[member.start:member.end] == b"null":
        return document[:member.start] + b"[" + items + b"]" + document[member.end:]
    cdef Member array = _find(s, member.start, n, -1)
    return document[:array.close] + (b"" if array.empty else b",") + items + document[array.close:]

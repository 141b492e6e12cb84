"""The Cython kernels against their readable twins in ``oracles``, on documents of any shape and on no documents."""

import json
from collections.abc import Callable
from hashlib import new as new_hash
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests import oracles
from wave_proxy._fast.digest import Verifier
from wave_proxy._fast.manifest import append_items, set_member
from wave_proxy.errors import ContentMismatch, DigestMismatch, SizeMismatch

Path = tuple[str | int, ...]
Edit = Callable[[bytes, Path, bytes], bytes]

# --- digest ------------------------------------------------------------------------------------------------------


def outcome(verifier: Verifier | oracles.Verifier, chunks: list[bytes]) -> tuple[list[int], type[Exception] | None]:
    """The sizes after each chunk that was taken, and how it ended."""
    sizes = []
    try:
        for chunk in chunks:
            verifier.update(chunk)
            sizes.append(verifier.size)
        verifier.finish()
    except ContentMismatch as err:
        return [*sizes, verifier.size], type(err)
    return sizes, None


@given(
    chunks=st.lists(st.binary(max_size=200), max_size=8),
    algorithm=st.sampled_from(["sha256", "sha512"]),
    announced=st.none() | st.integers(-3, 3),
    corrupt=st.booleans(),
)
def test_verifier_is_its_twin(chunks: list[bytes], algorithm: str, announced: int | None, corrupt: bool) -> None:
    content = b"".join(chunks)
    digest = f"{algorithm}:{new_hash(algorithm, content + b'x' * corrupt).hexdigest()}"
    size = -1 if announced is None else max(len(content) + announced, 0)
    expected = outcome(oracles.Verifier(digest, size), chunks)
    assert outcome(Verifier(digest, size), chunks) == expected
    if size in (-1, len(content)):
        assert expected[1] == (DigestMismatch if corrupt else None)
    else:
        assert expected[1] == SizeMismatch


def test_verifier_messages_name_what_was_announced() -> None:
    digest = f"sha256:{'0' * 64}"
    verifier = Verifier(digest, 3)
    with pytest.raises(SizeMismatch, match=f"more than the 3 bytes announced for {digest}"):
        verifier.update(b"1234")
    assert verifier.size == 0
    verifier.update(b"12")
    with pytest.raises(SizeMismatch, match=f"2 of the 3 bytes announced for {digest}"):
        verifier.finish()
    verifier.update(b"3")
    with pytest.raises(DigestMismatch, match=f"expected {digest} and got sha256:a665a459"):
        verifier.finish()


def test_verifier_takes_bytes_only() -> None:
    verifier: Any = Verifier(f"sha256:{'0' * 64}")
    for wrong in (None, "text", 7):
        with pytest.raises(TypeError):
            verifier.update(wrong)
    with pytest.raises(AttributeError):
        verifier.size = 5
    with pytest.raises(ValueError):
        Verifier("md0:00")


# --- documents ---------------------------------------------------------------------------------------------------

KEYS = ["a", "b", "config", "layers", "", "ä", "€", "😀", 'q"uote', "back\\slash", "\n", "a\\u0062", "{", "]"]
SPACE = st.sampled_from(["", "", "", " ", "\n\t", "\r\n  "])


def escaped(text: str) -> str:
    """A JSON string in which every character is an escape."""
    units = text.encode("utf-16-be")
    return '"' + "".join(f"\\u{units[i]:02x}{units[i + 1]:02X}" for i in range(0, len(units), 2)) + '"'


def spelled(text: str) -> st.SearchStrategy[str]:
    """The ways to write a string in JSON."""
    return st.sampled_from([json.dumps(text), json.dumps(text, ensure_ascii=False), escaped(text)])


STRINGS = (st.sampled_from(KEYS) | st.text(max_size=5)).flatmap(spelled)
NUMBERS = st.sampled_from(["0", "-1", "1.50", "-0.0", "1e-7", "2E+3", "123456789012345678901234567890", "1E400"])
LEAVES = STRINGS | NUMBERS | st.sampled_from(["true", "false", "null", "null"])


@st.composite
def containers(draw: st.DrawFn, inner: st.SearchStrategy[str]) -> str:
    """An array or an object, with equal keys now and then and any white space."""
    keyed = draw(st.booleans())
    items = []
    for value in draw(st.lists(inner, max_size=4)):
        key = f"{draw(st.sampled_from(KEYS).flatmap(spelled))}{draw(SPACE)}:{draw(SPACE)}" if keyed else ""
        items.append(f"{draw(SPACE)}{key}{value}{draw(SPACE)}")
    inside = ",".join(items) or draw(SPACE)
    return f"{{{inside}}}" if keyed else f"[{inside}]"


DOCUMENTS = st.recursive(LEAVES, lambda inner: containers(inner), max_leaves=15).map(str.encode)


@st.composite
def documents_with_path(draw: st.DrawFn) -> tuple[bytes, Path]:
    """A document, and a path that leads along its members and maybe a step further or astray."""
    document = draw(SPACE).encode() + draw(containers(DOCUMENTS.map(bytes.decode))).encode() + draw(SPACE).encode()
    here: Any = json.loads(document)
    path: list[str | int] = []
    while isinstance(here, dict | list) and here and (not path or draw(st.booleans())):
        step: Any = draw(st.sampled_from(sorted(here) if isinstance(here, dict) else range(len(here))))
        path.append(step)
        here = here[step]
    path += draw(st.lists(st.sampled_from(KEYS) | st.integers(-2, 3), max_size=0 if draw(st.booleans()) else 1))
    return document, tuple(path)


def result(edit: Edit, document: bytes, path: Path, text: bytes) -> bytes | None:
    """The edited document, None when the edit refuses."""
    try:
        return edit(document, path, text)
    except ValueError:
        return None


def check_same_meaning(edit: Edit, twin: Edit, document: bytes, path: Path, text: bytes) -> bytes | None:
    found, expected = result(edit, document, path, text), result(twin, document, path, text)
    assert (found is None) == (expected is None), f"{found!r} and {expected!r}"
    if found is not None and expected is not None:
        assert json.loads(found) == json.loads(expected)
    return found


MARK = b'"@ edit @"'


@given(documents_with_path())
def test_set_member_is_its_twin(case: tuple[bytes, Path]) -> None:
    check_same_meaning(set_member, oracles.set_member, *case, MARK)


@given(documents_with_path(), st.lists(DOCUMENTS, min_size=1, max_size=3).map(b",".join))
def test_append_items_is_its_twin(case: tuple[bytes, Path], items: bytes) -> None:
    check_same_meaning(append_items, oracles.append_items, *case, items)


@given(documents_with_path())
def test_set_member_leaves_every_other_byte(case: tuple[bytes, Path]) -> None:
    document, path = case
    found = result(set_member, document, path, MARK)
    if found is None:
        return
    start = found.index(MARK)
    before, after = found[:start], found[start + len(MARK) :]
    try:
        old = oracles.find(json.loads(document), path)
    except ValueError:
        added = json.dumps(path[-1]).encode() + b":"
        assert before.endswith(added)
        before = before.removesuffix(added)
        assert document in (before + after, before.removesuffix(b",") + after)
        return
    assert document.startswith(before)
    assert document.endswith(after)
    replaced = document[len(before) : len(document) - len(after)]
    assert replaced == replaced.strip()
    assert json.loads(replaced) == old


@given(documents_with_path())
def test_append_items_leaves_every_other_byte(case: tuple[bytes, Path]) -> None:
    document, path = case
    found = result(append_items, document, path, MARK)
    if found is None:
        return
    start = found.index(MARK)
    before, after = found[:start], found[start + len(MARK) :]
    try:
        old = oracles.find(json.loads(document), path)
    except ValueError:
        added = json.dumps(path[-1]).encode() + b":["
        assert before.endswith(added)
        assert after.startswith(b"]")
        before = before.removesuffix(added)
        assert document in (before + after[1:], before.removesuffix(b",") + after[1:])
        return
    if old is None:
        assert document == before.removesuffix(b"[") + b"null" + after.removeprefix(b"]")
    else:
        assert document == (before.removesuffix(b",") if old else before) + after


@given(documents_with_path())
def test_edits_are_repeatable(case: tuple[bytes, Path]) -> None:
    document, path = case
    once = result(set_member, document, path, MARK)
    if once is not None:
        assert set_member(once, path, MARK) == once
        assert json.loads(append_items(set_member(once, path, b"[]"), path, b"1,2")) == json.loads(
            set_member(once, path, b"[1,2]")
        )


@pytest.mark.parametrize(
    ("document", "path", "expected"),
    [
        (b'{"a":1}', ("a",), b'{"a":X}'),
        (b'{"a":1,"a":2}', ("a",), b'{"a":1,"a":X}'),
        (b'{"a":{"b":1},"a":{"b":2},"c":{"b":3}}', ("a", "b"), b'{"a":{"b":1},"a":{"b":X},"c":{"b":3}}'),
        (b'{"a":{"b":1},"a":{}}', ("a", "b"), b'{"a":{"b":1},"a":{"b":X}}'),
        (rb'{"a":1,"\u0061":2}', ("a",), rb'{"a":1,"\u0061":X}'),
        (rb'{"\u0061":1,"b":2}', ("a",), rb'{"\u0061":X,"b":2}'),
        (rb'{"a\\":1,"a":2}', ("a",), rb'{"a\\":1,"a":X}'),
        (rb'{"\ud83d\ude00":1}', ("😀",), rb'{"\ud83d\ude00":X}'),
        ('{"😀":1}'.encode(), ("😀",), '{"😀":X}'.encode()),
        (b'{"x":"{\\"a\\":1}","a":2}', ("a",), b'{"x":"{\\"a\\":1}","a":X}'),
        (b'{"x":{"a":1},"a":2}', ("a",), b'{"x":{"a":1},"a":X}'),
        (b'{"x":[{"a":1}],"a" :\n2 }', ("a",), b'{"x":[{"a":1}],"a" :\nX }'),
        (b'{"a":1}', ("b",), b'{"a":1,"b":X}'),
        (b"{ }", ("b",), b'{ "b":X}'),
        (b'{"a":1 }\n', ("b",), b'{"a":1 ,"b":X}\n'),
        (b"{}", ("\u00e9",), b'{"\\u00e9":X}'),
        (b"[1, 2,3]", (1,), b"[1, X,3]"),
        (b'[{"a":[]},{"a":[5,6]}]', (1, "a", 0), b'[{"a":[]},{"a":[X,6]}]'),
        (b'{"n":1.10,"big":123456789012345678901234567890,"a":0}', ("a",), None),
    ],
)
def test_set_member(document: bytes, path: Path, expected: bytes | None) -> None:
    assert set_member(document, path, b"X") == (expected or document.replace(b'"a":0', b'"a":X'))


@pytest.mark.parametrize(
    ("document", "path", "expected"),
    [
        (b'{"a":[1]}', ("a",), b'{"a":[1,X,Y]}'),
        (b'{"a":[]}', ("a",), b'{"a":[X,Y]}'),
        (b'{"a":[\n] }', ("a",), b'{"a":[\nX,Y] }'),
        (b'{"a":[[1],[ 2 ] ]}', ("a",), b'{"a":[[1],[ 2 ] ,X,Y]}'),
        (b'{"a":null}', ("a",), b'{"a":[X,Y]}'),
        (b'{"b":1}', ("a",), b'{"b":1,"a":[X,Y]}'),
        (b"{}", ("a",), b'{"a":[X,Y]}'),
        (b'{"a":[1],"a":[2]}', ("a",), b'{"a":[1],"a":[2,X,Y]}'),
        (b"[[],[]]", (1,), b"[[],[X,Y]]"),
    ],
)
def test_append_items(document: bytes, path: Path, expected: bytes) -> None:
    assert append_items(document, path, b"X,Y") == expected


@pytest.mark.parametrize("edit", [set_member, append_items])
@pytest.mark.parametrize(
    ("document", "path"),
    [
        (b'{"a":1}', ()),
        (b'{"a":1}', (0,)),
        (b"[1]", ("a",)),
        (b"[1]", (1,)),
        (b"[1]", (-1,)),
        (b"[]", (0,)),
        (b'{"a":1}', ("a", "b")),
        (b'{"a":1}', ("b", "c")),
        (b'{"a":{}}', ("a", 0)),
        (b'{"a":"x"}', ("a", "b")),
        (b'"a"', ("a",)),
        (b"null", ("a",)),
        (b"", ("a",)),
        (b" ", ("a",)),
    ],
)
def test_path_that_leads_nowhere(edit: Edit, document: bytes, path: Path) -> None:
    with pytest.raises(ValueError):
        edit(document, path, b"1")


@pytest.mark.parametrize("value", [b"1", b'"x"', b"{}", b"true"])
def test_append_items_to_no_array(value: bytes) -> None:
    with pytest.raises(ValueError):
        append_items(b'{"a":' + value + b"}", ("a",), b"1")


@pytest.mark.parametrize("edit", [set_member, append_items])
@pytest.mark.parametrize(
    "document",
    [
        b"{",
        b'{"',
        b'{"a',
        b'{"a\\',
        b'{"a"',
        b'{"a":',
        b'{"a":[',
        b'{"a":[]',
        b'{"a":[],',
        b'{"a":[]]',
        b'{"a" []}',
        b"{a:[]}",
        b'{"b":1 "a":[]}',
        b'{"b":,"a":[]}',
        b'{"b":}',
        b'{"b":1,}',
        b'{"b":"\\',
        b'{"b":]}',
        b"{,}",
        b'{"\\u00":[]}',
        b'{"\\ud83d\xff":[]}',
    ],
)
def test_malformed_document(edit: Edit, document: bytes) -> None:
    with pytest.raises(ValueError):
        edit(document, ("a",), b"1")


def test_depth_costs_no_stack() -> None:
    depth = 1_000_000
    document = b'{"x":' + b"[" * depth + b"]" * depth + b',"a":[]}'
    assert append_items(document, ("a",), b"7").endswith(b']],"a":[7]}')
    assert set_member(document, ("a",), b"7").endswith(b']],"a":7}')


@pytest.mark.parametrize("edit", [set_member, append_items])
def test_arguments_have_one_type(edit: Any) -> None:
    for wrong in ((None, ("a",), b"1"), ("{}", ("a",), b"1"), (b"{}", ["a"], b"1"), (b"{}", ("a",), "1")):
        with pytest.raises(TypeError):
            edit(*wrong)
    with pytest.raises(TypeError):
        edit(b"{}", (None,), b"1")


# --- anything at all ---------------------------------------------------------------------------------------------

STRUCTURE = st.text(alphabet='{}[]",:\\ \n01aeu-"ä', max_size=40).map(str.encode)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A document from which some bytes were taken, or into which some were put."""
    document = draw(containers(DOCUMENTS.map(bytes.decode))).encode()
    start = draw(st.integers(0, len(document)))
    end = draw(st.integers(start, len(document)))
    return document[:start] + draw(st.binary(max_size=3) | STRUCTURE) + document[end:]


@pytest.mark.parametrize(("edit", "twin"), [(set_member, oracles.set_member), (append_items, oracles.append_items)])
@given(
    document=st.binary(max_size=50) | STRUCTURE | damaged(),
    path=st.lists(st.sampled_from(["a", "b", "", "ä", "config", "\ud800"]) | st.integers(-1, 2), max_size=3).map(tuple),
)
@example(document=b'{"\x00":1}', path=("a",))
@example(document=b'{"\\\x00', path=("a",))
@example(document=b"\xef\xbb\xbf{}", path=("a",))
def test_no_input_crashes(edit: Edit, twin: Edit, document: bytes, path: Path) -> None:
    found = result(edit, document, path, b"1")
    try:
        json.loads(document.decode())
    except ValueError:
        return  # no document: refused or edited, as it happens, but alive
    if not any("\ud800" in str(step) for step in path):
        check_same_meaning(edit, twin, document, path, b"1")
    assert found == result(edit, document, path, b"1")

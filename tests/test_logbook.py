"""What becomes of a build's output on its way to the log."""

import asyncio

import pytest

from builder.logbook import LogBook
from wave_proxy.image.build import LOCK_END, LOCK_START


async def logged(*pieces: bytes, book: LogBook | None = None) -> tuple[str, bytes | None]:
    """The log and the lock after these writes."""
    sent: list[bytes] = []

    async def append(text: bytes) -> None:
        sent.append(text)

    book = book or LogBook(append)
    book._append = append
    for piece in pieces:
        book.write(piece)
    book.close()
    await book.run()
    return b"".join(sent).decode(), book.lock


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([b"one\ntw", b"o\nthree"], "one\ntwo\nthree\n"),
        ([b"\x1b[1;31mred\x1b[0m \x1b]0;title\x07plain\x1b(B\n"], "red plain\n"),
        ([b"10%\r50%\r100%\ndone\r\n"], "100%\ndone\n"),
        ([b"a\x00b\x08\tc\n"], "ab\tc\n"),
        ([b"\xff\xe2\x82", b"\xac\n"], "\ufffd€\n"),
        ([b"\x1b", b"[31mx\n"], "x\n"),
        ([b"\n\n"], "\n\n"),
        ([], ""),
        ([b"x" * 70_000, b"y\n"], "x" * 70_000 + "\ny\n"),
    ],
)
async def test_lines_are_cleaned(pieces: list[bytes], expected: str) -> None:
    assert await logged(*pieces) == (expected, None)


async def test_lock_is_taken_out() -> None:
    text = f"before\n+ echo '{LOCK_START}'\n{LOCK_START}\nname=1\nother=2\n{LOCK_END}\nafter\n"
    assert await logged(text.encode()) == (f"before\n+ echo '{LOCK_START}'\nafter\n", b"name=1\nother=2\n")


async def test_lock_is_taken_out_of_the_lines_of_buildkit() -> None:
    text = f"#7 12.3 before\n#7 12.34 {LOCK_START}\n#7 12.34 name=1\n#7 12.35 {LOCK_END}\n#7 12.4 after\n"
    assert await logged(text.encode()) == ("#7 12.3 before\n#7 12.4 after\n", b"name=1\n")


async def test_last_whole_lock_counts() -> None:
    text = f"{LOCK_START}\na\n{LOCK_END}\n{LOCK_START}\nb\n{LOCK_END}\n{LOCK_END}\n"
    assert await logged(text.encode()) == (f"{LOCK_END}\n", b"b\n")


async def test_lock_without_an_end_stays_in_the_log() -> None:
    text = f"before\n{LOCK_START}\nname=1\n"
    assert await logged(text.encode()) == (text, None)


async def test_own_lines_begin_on_a_line_of_their_own() -> None:
    book = LogBook(lambda _: asyncio.sleep(0))
    book.write(b"unfinished")
    book.say("two\nlines")
    assert await logged(book=book) == ("unfinished\n>> two lines\n", None)


async def test_names_are_hidden() -> None:
    book = LogBook(lambda _: asyncio.sleep(0))
    book.hide("127.0.0.1:9090/wt/secret/library/a", "docker.io/library/a")
    text = b"pulling 127.0.0.1:9090/wt/secret/library/a:1 from 127.0.0.1:9090/wt/secret/library/a\n"
    assert await logged(text, book=book) == ("pulling docker.io/library/a:1 from docker.io/library/a\n", None)


async def test_lines_are_sent_as_they_come_and_in_large_pieces() -> None:
    sent: asyncio.Queue[bytes] = asyncio.Queue()
    book = LogBook(sent.put)
    running = asyncio.create_task(book.run())
    book.write(b"first\n")
    assert await sent.get() == b"first\n"
    for number in range(1000):
        book.write(b"%d\n" % number)
    assert (await sent.get()).count(b"\n") == 1000
    book.write(b"x" * 60_000 + b"\n")
    book.write((b"y" * 60_000 + b"\n") * 10)
    book.close()
    await running
    sizes = [len(sent.get_nowait()) for _ in range(sent.qsize())]
    assert sum(sizes) == 11 * 60_001
    assert max(sizes) <= 256 << 10


async def test_what_cannot_be_sent_ends_it() -> None:
    async def refuse(_: bytes) -> None:
        raise ValueError("lost")

    book = LogBook(refuse)
    book.write(b"x\n")
    with pytest.raises(ValueError, match="lost"):
        await book.run()

"""Times, durations, and texts of unknown origin."""

from datetime import UTC, datetime, timedelta, timezone

import pytest

from api.pages.formats import format_duration, format_time, readable

MOMENT = datetime(2022, 10, 20, 17, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("minutes", "text"),
    [
        (0, "2022-10-20 17:00 (GMT)"),
        (120, "2022-10-20 19:00 (GMT+2)"),
        (-300, "2022-10-20 12:00 (GMT-5)"),
        (330, "2022-10-20 22:30 (GMT+5:30)"),
        (-210, "2022-10-20 13:30 (GMT-3:30)"),
    ],
)
def test_times_are_in_their_own_zone(minutes: int, text: str) -> None:
    assert format_time(MOMENT.astimezone(timezone(timedelta(minutes=minutes)))) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(10, "0:10"), (60, "1:00"), (90, "1:30"), (130, "2:10"), (3600, "60:00"), (0.9, "0:00"), (None, "-")],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert format_duration(seconds) == text


def test_no_time() -> None:
    assert format_time(None) == "-"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[1;32mgreen\x1b[0m", "green"),
        ("a\x1b]0;title\x07b\x1b]8;;http://x\x1b\\c", "abc"),
        ("\x1b(Bx\x1bMy\x1b[?25lz", "xyz"),
        ("1%\r50%\r\n100%\r\r\n", "1%\n50%\n100%\n"),
        ("tab\tstays\n", "tab\tstays\n"),
        ("\x00\x07\x7f\x85", "\ufffd" * 4),
        ("cut off \x1b[1", "cut off \ufffd[1"),
        ("user\u202egnp.exe\u2066\ufeff", "user\ufffdgnp.exe\ufffd\ufffd"),
        ("größer 🐋 <b>", "größer 🐋 <b>"),
    ],
    ids=ascii,
)
def test_what_a_terminal_would_obey_is_not_shown(text: str, shown: str) -> None:
    assert readable(text) == shown

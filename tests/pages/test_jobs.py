"""Ids in addresses (``wave.md`` V37), and the ends of logs."""

import pytest

from api.pages.jobs import MAX_LOG_BYTES, end_of_log, inspect_path, is_series, numbered, path_of


@pytest.mark.parametrize(
    ("given", "whole"),
    [
        ("12345-1", "12345_1"),
        ("foo-887766-1", "foo-887766_1"),
        ("bd-12345-1", "bd-12345_1"),
        ("12345_1", None),
        ("bd-12345_1", None),
        ("scan-12345", "scan_12345"),
        ("scan-12345-", None),
        ("scan-12345-01", "scan-12345_01"),
        ("bd-1234567890123456", None),  # digits only by chance
        ("sc-1234567890123456", None),
        ("bd-1234567890123456-2", "bd-1234567890123456_2"),
        ("bd-beac24afd572398d", None),
        ("bd-beac24afd572398d-٣", None),
    ],
)
def test_a_dash_before_the_number(given: str, whole: str | None) -> None:
    assert numbered(given) == whole


@pytest.mark.parametrize(
    ("given", "is_one"),
    [
        ("bd-beac24afd572398d", True),
        ("beac24afd572398d", True),
        ("beac24afd572398", True),
        ("beac24afd57239", True),
        ("bd-beac24afd572398d_1", False),
        ("beac24afd5723", False),
        ("bd-beac24afd572398d\n", False),
    ],
)
def test_a_missing_number(given: str, is_one: bool) -> None:
    assert is_series(given) is is_one


def test_addresses_are_of_this_server_whatever_the_id_is() -> None:
    assert path_of("build", "//evil.test/%0d\r\n") == "/view/builds/%2F%2Fevil.test%2F%250d%0D%0A"
    assert inspect_path("a/b:c&platform=x") == "/view/inspect?image=a%2Fb%3Ac%26platform%3Dx"
    assert inspect_path("oras://a/b:c") == ""


def test_a_short_log_is_shown_whole() -> None:
    log = end_of_log("größer\n".encode(), 0, "/logs")
    assert (log.text, log.cut, log.size) == ("größer\n", 0, 9)


def test_of_a_long_log_the_last_lines_are_shown() -> None:
    content = b"".join(b"line %06d\n" % number for number in range(20_000))
    log = end_of_log(content[-MAX_LOG_BYTES:], len(content) - MAX_LOG_BYTES, "/logs")
    assert log.size == len(content)
    assert log.text == content[log.cut :].decode()
    assert log.text.startswith("line ")
    assert MAX_LOG_BYTES - 12 <= len(log.text) <= MAX_LOG_BYTES


def test_a_line_that_is_longer_than_what_is_shown_is_cut() -> None:
    log = end_of_log(b"x" * MAX_LOG_BYTES, 5, "/logs")
    assert (log.cut, log.text) == (5, "x" * MAX_LOG_BYTES)

"""Reasons of failures, taken apart."""

import pytest

from api.pages.reasons import Reason, read_reason

ERROR = "Error: reading manifest 1.0 in docker.io/a/b"


@pytest.mark.parametrize(
    ("text", "log", "reason"),
    [
        (
            f"not found: {ERROR}; check: its name",
            f"STEP 1\n{ERROR}: x; y\n",
            Reason("not found", ERROR, "check: its name"),
        ),
        (f"not found: {ERROR[:20]}…; check it", f"{ERROR}\n", Reason("not found", f"{ERROR[:20]}…", "check it")),
        ("a: b c; d", "x \x1b[31mb\t  c\x1b[0m", Reason("a", "b c", "d")),
        ("a: b; c; d", "b; c\n", Reason("a", "b; c", "d")),
        ("timed out: it took long; do less", "STEP 1\n>> failed: timed out: it took long; do less\n", None),
        (
            "RUN a b… ended with exit status 3: see it",
            "STEP 2: RUN  a b c\n",
            Reason("a step ended with exit status 3", "RUN a b…", "see it"),
        ),
        ("x: y; z (exit status 7)", "error: x: y; z\n", Reason("exit status 7", "x: y; z")),
        ("RUN x ended with exit status 3: see the log", "x\n", None),
        ("cancelled", "cancelled\n", None),
        (": ; ", "a\n", None),
    ],
    ids=ascii,
)
def test_the_line_of_the_log_is_told_apart(text: str, log: str, reason: Reason | None) -> None:
    assert read_reason(text, log) == (reason or Reason(text))


def test_what_did_not_fail_has_no_reason() -> None:
    assert read_reason("", "log\n") is None

"""Who gets a page: the ``Accept`` of browsers and of programs."""

import pytest
from starlette.requests import Request

from api.pages.audience import wants_page

CHROMIUM = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"


@pytest.mark.parametrize(
    ("accepted", "is_person"),
    [
        ([CHROMIUM], True),
        (["text/html"], True),
        (["application/json", "Text/HTML; q=0.5"], True),
        ([], False),
        (["*/*"], False),
        (["text/*"], False),
        (["application/json, text/plain"], False),
        (["text/html;q=0"], False),
        (["text/html; q=0.00, */*"], False),
        (["text/html;q=0.05"], True),
        (["x-text/html"], False),
    ],
    ids=str,
)
def test_who_wants_a_page(accepted: list[str], is_person: bool) -> None:
    headers = [(b"accept", value.encode()) for value in accepted]
    assert wants_page(Request({"type": "http", "headers": headers})) is is_person

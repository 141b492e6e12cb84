"""Endpoints of Platforms, and under which names pairings and refreshed tokens are kept."""

import pytest
from pydantic import ValidationError

from wave_proxy.config.model import PlatformSettings
from wave_proxy.image.platform import is_endpoint, known_endpoint, matches_endpoint, pairing_key, session_key

CLOUD = "https://api.cloud.seqera.io"


def test_names_of_pairings_and_tokens_are_the_documented_ones() -> None:
    assert pairing_key("tower", CLOUD) == "88c1f586e515fa84fb71dbc42d9f185d"
    assert session_key(CLOUD, "TOKEN") == "9ab5a225586002ae071e30cc4f3ee487"


@pytest.mark.parametrize(
    ("given", "known"),
    [
        ("", CLOUD),
        ("http://foo.com", "http://foo.com"),
        ("http://foo.com/api/", "http://foo.com/api"),
        ("https://api.tower.nf", CLOUD),
        ("https://api.stage-tower.net", "https://api.cloud.stage-seqera.io"),
    ],
)
def test_endpoints_are_called_as_today(given: str, known: str) -> None:
    assert known_endpoint(given) == known


@pytest.mark.parametrize("text", ["http://a", "https://a.b:8443/api", "https://*.b/api", "http://[::1]:80"])
def test_endpoints_are_addresses(text: str) -> None:
    assert is_endpoint(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "foo",
        "ftp://a",
        "https://",
        "https://a:x",
        "https://u:p@a",
        "https://a?b",
        "https://a#b",
        "https://a b",
        "https://a\\.b/api",
        "https://[::1].b/api",
        "https://ä",
    ],
)
def test_other_texts_are_none(text: str) -> None:
    assert not is_endpoint(text)


@pytest.mark.parametrize(
    ("endpoint", "pattern", "fits"),
    [
        ("https://a.example/api", "https://a.example/api", True),
        ("https://a.example/api", "https://a.example/api/", True),
        ("https://a.example/api", "https://*.example/api", True),
        ("https://a.example/api", "https://a.example", False),
        ("http://a.example/api", "https://a.example/api", False),
        ("https://evil.com/x.example/api", "https://*.example/api", False),
        ("https://a.example.evil.com/api", "https://a.example*/api", True),
        ("https://b.example/api", "https://a.example/api", False),
    ],
)
def test_patterns_never_reach_over_a_slash(endpoint: str, pattern: str, fits: bool) -> None:
    assert matches_endpoint(endpoint, ("https://other", pattern)) is fits


WRONG = {
    "no-endpoints": ({"pairing_token": "x"}, "enabled needs endpoints"),
    "no-token": ({"endpoints": [CLOUD]}, "enabled needs pairing_token: without one anybody"),
    "no-address": ({"endpoints": ["foo"], "pairing_token": "x"}, "'foo' is not an address"),
    "any-host": ({"endpoints": ["https://*"], "pairing_token": "x"}, "is not an address"),
}


@pytest.mark.parametrize(("table", "message"), WRONG.values(), ids=WRONG)
def test_pairing_is_not_switched_on_by_halves(table: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PlatformSettings.model_validate({"enabled": True, **table})


@pytest.mark.parametrize("more", [{"pairing_token": "x"}, {"open_pairing": True}], ids=["token", "open"])
def test_pairing_takes_a_token_or_the_operators_word_that_it_needs_none(more: dict[str, object]) -> None:
    settings = PlatformSettings.model_validate({"enabled": True, "endpoints": [f"{CLOUD}/"], **more})
    assert settings.endpoints == (CLOUD,)

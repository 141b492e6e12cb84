"""Whose address counts: the peer's, or one that a trusted proxy names."""

from pathlib import Path

import pytest

from wave_proxy.config.handed import ConfigInvalid
from wave_proxy.config.loading import load
from wave_proxy.serve.origin import ClientAddress

PROXIES = ("10.0.0.0/8", "2001:db8:f::/48", "192.0.2.7")
CLIENT, PROXY = "203.0.113.9", "10.0.0.1"


def find(peer: str, *lines: str, trusted: tuple[str, ...] = PROXIES) -> str:
    headers = [(b"host", b"wave"), *((b"x-forwarded-for", line.encode("latin-1")) for line in lines)]
    return ClientAddress(trusted).find(peer, headers)


@pytest.mark.parametrize("peer", [CLIENT, "2001:db8::1", "::ffff:203.0.113.9", "192.0.2.70", "", "x"])
def test_a_stranger_is_not_believed(peer: str) -> None:
    assert find(peer, "198.51.100.1") == peer


def test_without_trusted_proxies_nobody_is_believed() -> None:
    assert find(PROXY, "198.51.100.1", trusted=()) == PROXY
    assert find("", "198.51.100.1", trusted=()) == ""


@pytest.mark.parametrize("peer", [PROXY, "2001:db8:f::5", "192.0.2.7", "::ffff:10.1.2.3", "2001:db8:f::5%eth0"])
def test_a_trusted_proxy_is_believed(peer: str) -> None:
    assert find(peer, CLIENT) == CLIENT
    assert ClientAddress(PROXIES).is_trusted(peer)


def test_a_unix_socket_is_trusted_when_it_is_named() -> None:
    assert find("", CLIENT, trusted=("unix",)) == CLIENT
    assert find("", CLIENT) == ""
    assert find(PROXY, CLIENT, trusted=("unix",)) == PROXY


@pytest.mark.parametrize(
    ("lines", "address"),
    [
        (["198.51.100.1, 203.0.113.9"], CLIENT),  # what the client itself said stands further to the left
        (["198.51.100.1", "203.0.113.9"], CLIENT),
        (["203.0.113.9", "10.0.0.2, 10.0.0.3"], CLIENT),
        (["198.51.100.1, 203.0.113.9, 2001:db8:f::2,192.0.2.7"], CLIENT),
        (["not an address, 203.0.113.9"], CLIENT),
        (["203.0.113.9, "], CLIENT),
        (["203.0.113.9", ""], CLIENT),
        ([" 203.0.113.9\t"], CLIENT),
        (["10.0.0.9, 10.0.0.2"], "10.0.0.9"),
        (["10.0.0.9"], "10.0.0.9"),
        ([], PROXY),
        ([""], PROXY),
        ([" , ,"], PROXY),
    ],
)
def test_the_right_most_entry_that_is_no_trusted_proxy(lines: list[str], address: str) -> None:
    assert find(PROXY, *lines) == address


@pytest.mark.parametrize(
    ("entry", "address"),
    [
        ("203.0.113.9:49152", CLIENT),
        ("2001:DB8::0001", "2001:db8::1"),
        ("[2001:db8::1]", "2001:db8::1"),
        ("[2001:db8::1]:443", "2001:db8::1"),
        ("::ffff:203.0.113.9", CLIENT),
        ("[::ffff:203.0.113.9]:1", CLIENT),
    ],
)
def test_forms_of_an_address(entry: str, address: str) -> None:
    assert find(PROXY, entry) == address


@pytest.mark.parametrize(
    "entry",
    [
        "unknown",
        "_hidden",
        "for=203.0.113.9",
        'for="[2001:db8::1]:80"',
        "203.0.113",
        "203.0.113.256",
        "203.0.113.9:http",
        "203.0.113.9:123456",
        "203.0.113.9 198.51.100.1",
        "[203.0.113.9]",
        "[2001:db8::1",
        "[2001:db8::1]443",
        "2001:db8::1::",
        "fe80::1%eth0",
        "[fe80::1%" + "x" * 1000 + "]",
        "203.0.113.9\u00b2",
        "3405803785",
        "\u00e9\u0000",
    ],
)
def test_what_is_no_address_leaves_the_peers(entry: str) -> None:
    assert find(PROXY, f"{CLIENT}, {entry}") == PROXY
    assert find(PROXY, f"{CLIENT}, {entry}, 10.0.0.2") == PROXY


@pytest.mark.parametrize("entry", ["", "10.0.0.2", "x"])
def test_a_long_header_is_not_read_through(entry: str) -> None:
    many = f"{CLIENT}, " + ",".join([entry] * 20_000)
    assert find(PROXY, many) == PROXY


@pytest.mark.parametrize("entry", [*PROXIES, "::1", "0.0.0.0/0", "unix"])
def test_the_configuration_takes_what_can_be_trusted(tmp_path: Path, entry: str) -> None:
    file = tmp_path / "wave.toml"
    file.write_text(f'[http]\ntrusted_proxies = ["{entry}"]')
    trusted = load(file, {}).http.trusted_proxies
    assert ClientAddress(trusted).is_trusted("" if entry == "unix" else entry.partition("/")[0])


@pytest.mark.parametrize(
    "entry", ["", "10.0.0.1/8", "10.0.0.0/33", "proxy.example.com", "10.0.0.*", "unix:/x", "fe80::1%"]
)
def test_the_configuration_refuses_the_rest(tmp_path: Path, entry: str) -> None:
    file = tmp_path / "wave.toml"
    file.write_text(f'[http]\ntrusted_proxies = ["10.0.0.0/8", "{entry}"]')
    with pytest.raises(ConfigInvalid, match=r"^http\.trusted_proxies\.1: expected an address, a network such as"):
        load(file, {})


def test_trusted_proxies_come_from_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WAVE_HTTP__TRUSTED_PROXIES", '["10.0.0.0/8", "unix"]')
    assert load(None, {}).http.trusted_proxies == ("10.0.0.0/8", "unix")

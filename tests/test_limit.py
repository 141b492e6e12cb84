"""What a limit is, and that the configuration takes the same texts for one."""

from pathlib import Path

import pytest

from wave_proxy.config.handed import ConfigInvalid
from wave_proxy.config.loading import load
from wave_proxy.image.limit import Limit, parse_limit

GOOD = [
    ("100/1h", Limit(100, 3600.0), "100/1h"),
    ("2000/1m", Limit(2000, 60.0), "2000/1m"),
    (" 25 / 1d ", Limit(25, 86400.0), "25/1d"),
    ("3/250ms", Limit(3, 0.25), "3/250ms"),
    ("7/1.5s", Limit(7, 1.5), "7/1.5s"),
    ("5/90m", Limit(5, 5400.0), "5/1.5h"),
    ("1000000000/366d", Limit(10**9, 366 * 86400.0), "1000000000/366d"),
    ("1/1ms", Limit(1, 0.001), "1/1ms"),
]
BAD = ["", "100", "100/h", "-1/1h", "1.5/1h", "100/1w", "Off", "100/1h x", f"{10**400}/1h", f"1/{10**400}d"]
BAD += ["100/0s", "100/0.5ms", "1000000001/1h", "0/1h", "1/367d", "1/9999999999d"]


@pytest.mark.parametrize(("text", "limit", "shown"), GOOD)
def test_a_limit_is_read_and_shown(text: str, limit: Limit, shown: str) -> None:
    assert parse_limit(text) == limit
    assert str(limit) == shown
    assert parse_limit(shown) == limit


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_limit_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_limit(text)
    assert parse_limit("off") is None


@pytest.mark.parametrize("text", [*(text for text, _, _ in GOOD), "off"])
def test_the_configuration_takes_what_is_a_limit(tmp_path: Path, text: str) -> None:
    file = tmp_path / "wave.toml"
    file.write_text(f'[quota]\nbuild_identified = "{text}"')
    assert load(file, {}).quota.build_identified == text


@pytest.mark.parametrize("text", BAD)
def test_the_configuration_refuses_what_is_none(tmp_path: Path, text: str) -> None:
    file = tmp_path / "wave.toml"
    file.write_text(f'[quota]\nbuild_identified = "{text}"')
    with pytest.raises(ConfigInvalid, match=r"^quota\.build_identified: expected .*max.*duration"):
        load(file, {})


def test_holding_may_be_switched_off(tmp_path: Path) -> None:
    file = tmp_path / "wave.toml"
    file.write_text('[quota]\nwait = "0s"\nmax_waiting = 1\nwhen_redis_is_down = "closed"')
    quota = load(file, {}).quota
    assert (quota.wait, quota.max_waiting, quota.when_redis_is_down) == (0.0, 1, "closed")


@pytest.mark.parametrize("line", ['wait = "-1s"', "wait = -1", "max_waiting = 0", 'when_redis_is_down = "ajar"'])
def test_what_can_not_be_held_is_refused(tmp_path: Path, line: str) -> None:
    file = tmp_path / "wave.toml"
    file.write_text(f"[quota]\n{line}")
    with pytest.raises(ConfigInvalid, match=rf"^quota\.{line.partition(' ')[0]}: "):
        load(file, {})

"""Pairing as Platforms do it: over a WebSocket through the port, refused unless the operator allows it."""

from collections.abc import Callable, Iterator

import pytest

from tests.platform.process import StandIn
from tests.servers import WaveProxy

ENDPOINT = "https://platform.example/api"
Wave = Callable[..., WaveProxy]


@pytest.fixture
def platform() -> Iterator[StandIn]:
    with StandIn(ENDPOINT) as started:
        yield started


def test_a_platform_pairs_and_its_heartbeats_keep_the_session(platform: StandIn, wave: Wave) -> None:
    proxy = wave(config=platform.config)
    platform.pair(proxy)
    assert platform.state()["sessions"] == ["paired"]
    assert proxy.stop() == 0
    platform.wait_for(lambda sessions: len(sessions) > 1)


REFUSED = {
    "not-enabled": ("", "[platform] enabled is false"),
    "another-token": (f'endpoints = ["{ENDPOINT}"]\npairing_token = "x"', "is not [platform] pairing_token"),
    "another-endpoint": ('endpoints = ["https://*.example/v2"]\npairing_token = "licence-7"', "is not in"),
}


@pytest.mark.parametrize(("table", "why"), REFUSED.values(), ids=REFUSED)
def test_who_must_not_pair_is_refused_and_the_log_says_why(table: str, why: str, platform: StandIn, wave: Wave) -> None:
    proxy = wave(config=f"[platform]\nenabled = true\n{table}\n" if table else "")
    platform.tell(pair=f"ws://{proxy.address}/pairing/tower/token/licence-7")
    platform.wait_for(lambda sessions: "1008" in sessions)
    assert why in proxy.stderr
    assert "licence-7" not in proxy.stderr
    assert "paired" not in platform.state()["sessions"]

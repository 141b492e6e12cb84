"""Tokens of Platform users, refreshed in the background: what is due, once, and what can't be."""

from time import time

from api.platform.refreshing import Refreshing
from tests.test_platforms import ANA, ENDPOINT, stage
from wave_proxy.image.platform import TokenPair
from wave_proxy.upstream.platform import PlatformClient


async def test_what_is_due_is_refreshed_by_one_process(redis_url: str) -> None:
    async with stage(redis_url) as place, stage(redis_url) as other:
        place.world.refresh = {"ref-1": ["jwt-2", "ref-2"]}
        await place.pairs.put_if_absent(ENDPOINT, "jwt-1", TokenPair("jwt-1", "ref-1"))
        for one in (place, other):
            refreshing = Refreshing(one.pairs, PlatformClient(one.wire, one.pairs, (ENDPOINT,)))
            await refreshing.refresh_due(time())
            await refreshing.refresh_due(time() + 3700)
        assert place.world.seen == [" POST /oauth/access_token"]
        assert other.world.seen == []
        assert await place.pairs.find(ENDPOINT, "jwt-1") == TokenPair("jwt-2", "ref-2")


async def test_one_that_fails_keeps_what_it_has_and_stops_no_other(redis_url: str) -> None:
    async with stage(redis_url) as place:
        place.world.users, place.world.refresh = {"jwt-9": ANA}, {"ref-b": ["jwt-9"]}
        for name in "abc":
            await place.pairs.put_if_absent(ENDPOINT, f"jwt-{name}", TokenPair(f"jwt-{name}", f"ref-{name}"))
        await Refreshing(place.pairs, PlatformClient(place.wire, place.pairs, (ENDPOINT,))).refresh_due(time() + 3700)
        found = [await place.pairs.find(ENDPOINT, f"jwt-{name}") for name in "abc"]
        assert found == [TokenPair("jwt-a", "ref-a"), TokenPair("jwt-9", "ref-b"), TokenPair("jwt-c", "ref-c")]


async def test_tokens_that_do_not_expire_are_left_alone(redis_url: str) -> None:
    async with stage(redis_url) as place:
        await place.pairs.put_if_absent(ENDPOINT, "tok-1", TokenPair("tok-1"))
        await Refreshing(place.pairs, PlatformClient(place.wire, place.pairs, (ENDPOINT,))).refresh_due(time() + 3700)
        assert place.world.seen == []

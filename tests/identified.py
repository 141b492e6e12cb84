"""Users of tests: issues access tokens as an operator does."""

import asyncio

from wave_proxy.state.identities import AccessTokens
from wave_proxy.state.redis import connect


async def issued(redis_url: str, email: str, *, expires: float = 0.0) -> str:
    """A new access token of the user with that e-mail address."""
    redis = connect(redis_url)
    try:
        text, _ = await AccessTokens(redis).create(email, expires=expires)
    finally:
        await redis.aclose()
    return text


def issue(redis_url: str, email: str, *, expires: float = 0.0) -> str:
    """The same for a test without an event loop."""
    return asyncio.run(issued(redis_url, email, expires=expires))

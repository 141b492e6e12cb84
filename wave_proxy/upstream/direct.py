"""Platforms asked with requests of our own, for those that this server can reach."""

import asyncio
from collections.abc import Mapping

from yarl import URL

from wave_proxy.errors import Denied, NameUnknown, UpstreamError, UpstreamTimeout
from wave_proxy.image.platform import PlatformCall, PlatformReply
from wave_proxy.upstream.egress import Egress, Endpoint

_MAX_BYTES = 4 << 20


class DirectTransport:
    """Each call is a request through the guarded egress; no redirect is followed."""

    def __init__(self, egress: Egress, *, allow_private: bool, timeout_s: float = 5.0) -> None:
        self._egress = egress
        self._allow_private = allow_private
        self._timeout_s = timeout_s

    async def call(self, endpoint: str, call: PlatformCall) -> PlatformReply:
        """The reply. Raises TimeoutError after some seconds; ConnectionError when there is none for another reason."""
        there = Endpoint("", str(URL(endpoint).origin()), self._allow_private)
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await self._egress.request(
                    call.method, call.uri, headers=_headers(call), endpoint=there, body=call.body.encode() or None
                )
                headers = {name.lower(): tuple(response.headers.getall(name)) for name in response.headers}
                content = await self._egress.read(response, _MAX_BYTES, f"the answer of {endpoint}")
        except UpstreamTimeout as err:
            raise TimeoutError(str(err)) from err
        except (Denied, NameUnknown, UpstreamError) as err:
            raise ConnectionError(str(err)) from err
        return PlatformReply(response.status, content.decode(errors="replace"), headers)


def _headers(call: PlatformCall) -> Mapping[str, str]:
    return {**call.headers, **({"Authorization": call.authorization} if call.authorization else {})}

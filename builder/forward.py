"""The forward proxy that is the only way out of some networks, and how what builds ask for goes through it."""

import asyncio
from collections.abc import Iterable
from urllib.parse import unquote, urlsplit

from builder.places import DEFAULT_PORTS, Place
from wave_proxy.errors import UpstreamTimeout, UpstreamUnavailable, clip
from wave_proxy.upstream.bearer import basic_authorization
from wave_proxy.upstream.credentials import Login
from wave_proxy.upstream.egress import Egress

_ANSWER_S = 30.0

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Forward:
    """Leads through the proxy at ``url``, ``http://[user:password@]host[:port]`` or the same with https.

    Hosts that this machine knows to be private are refused; all others the proxy resolves, and it decides.
    """

    def __init__(self, egress: Egress, url: str) -> None:
        parts = urlsplit(url)
        self._egress = egress
        self._host, self._tls = parts.hostname or "", parts.scheme == "https"
        self._port = parts.port or DEFAULT_PORTS[parts.scheme]
        login = Login(unquote(parts.username or ""), unquote(parts.password or ""))
        self.fields = (f"Proxy-Authorization: {basic_authorization(login)}",) if login.username else ()
        """The lines that a request needs besides its own."""

    async def connect(self, place: Place) -> Connection:
        """A connection to the proxy, for a plain request to that place; the caller closes it.

        Raises AddressRefused, and what ``Egress.connect`` raises of the proxy.
        """
        await self._egress.refuse_private(place.host, place.port)
        return await self._egress.connect(self._host, self._port, allow_private=True, tls=self._tls)

    async def tunnel(self, place: Place) -> Connection:
        """A connection through the proxy to that place; the caller closes it. Raises what ``connect`` raises."""
        reader, writer = await self.connect(place)
        proxy = f"the proxy on the way to {place.host}"
        lines = (f"CONNECT {place} HTTP/1.1", f"Host: {place}", *self.fields, "", "")
        try:
            async with asyncio.timeout(_ANSWER_S):
                writer.write("\r\n".join(lines).encode("latin-1"))
                status = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")[0].decode("latin-1")
            if not status.startswith(("HTTP/1.1 2", "HTTP/1.0 2")):
                raise UpstreamUnavailable(f"{proxy} answers with {clip(status)}")
        except TimeoutError as err:
            writer.close()
            raise UpstreamTimeout(f"{proxy} did not answer within {_ANSWER_S:g} s") from err
        except (OSError, EOFError, asyncio.LimitOverrunError) as err:
            writer.close()
            raise UpstreamUnavailable(f"{proxy} does not answer as one: {err}") from err
        except BaseException:
            writer.close()
            raise
        return reader, writer


def variables(url: str, direct: Iterable[str] = ()) -> dict[str, str]:
    """What tells programs of a proxy, and of hosts besides this machine to which they go ``direct``."""
    hosts = ",".join(dict.fromkeys(("localhost", "127.0.0.1", "::1", *direct)))
    lower = {"http_proxy": url, "https_proxy": url, "ftp_proxy": url, "no_proxy": hosts}
    return lower | {name.upper(): value for name, value in lower.items()}

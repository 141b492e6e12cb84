"""The way out: guarded HTTP to hosts that other people name, and the only module that opens outgoing connections."""

import asyncio
import socket
import ssl
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from math import ceil
from re import compile as compile_pattern
from time import time
from urllib.parse import urljoin

import aiohttp
from yarl import URL  # the type of URLs in aiohttp's API

from wave_proxy import __version__
from wave_proxy.errors import (
    AddressRefused,
    HostUnknown,
    Offline,
    TooManyRequests,
    UpstreamError,
    UpstreamFailing,
    UpstreamTimeout,
    UpstreamUnavailable,
    WaveError,
    clip,
)
from wave_proxy.image.oci import read_json_object
from wave_proxy.image.reference import DOCKER_HUB

MAX_REDIRECTS = 5

# aiohttp stops reading from the socket at twice this: enough to keep a fast line busy while a chunk is written to disk.
READ_BUFFER_BYTES = 1 << 20

# Each piece of a blob costs a change of threads and wakes who reads along.

Body = bytes | Callable[[], AsyncIterable[bytes]]
"""What a request carries: all of it, or what gives its pieces, anew for each time that it is sent.

A WaveError that the pieces raise is what the request raises.
"""

_STORE_TIMEOUT_S = 300.0  # object stores copy a large blob when it is complete
_LOOK_UP_S = 2.0
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MAX_ERROR_BYTES = 64 << 10
_MAX_RETRY_AFTER_S = 60
_USER_AGENT = f"wave-proxy/{__version__}"
_NAT64 = IPv6Network("64:ff9b::/96")
# What clouds tell their machines, secrets among it, at addresses that look public: Oracle's (a range for protocols,
# which Python before 3.11.10 takes for public) and Azure's.
_OF_CLOUDS = (IPv4Network("192.0.0.0/24"), IPv4Network("168.63.129.16/32"))

_PRINTABLE = compile_pattern(r"[!-~]*")
_HOST = compile_pattern(r"[A-Za-z0-9._:-]+")
_SECONDS = compile_pattern(r"-?[0-9]{1,9}")

_NO_SUCH_HOST = frozenset({socket.EAI_NONAME, socket.EAI_NODATA})


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where and how a registry is reached.

    ``registry`` is the host in image names; ``url`` is ``scheme://host[:port]`` without a slash at the end. ``ca_file``
    (PEM, trusted besides the system's), ``proxy`` (URL), and ``prefix``, which repositories begin with there, are empty
    when unused. ``is_own`` is for this server itself.
    """

    registry: str
    url: str
    allow_private: bool = False
    ca_file: str = ""
    proxy: str = ""
    is_own: bool = False
    prefix: str = ""

    def name_of(self, repository: str) -> str:
        """What a repository is called there; empty for none."""
        return f"{self.prefix}/{repository}" if self.prefix and repository else repository


def endpoint_for(
    registry: str,
    *,
    url: str = "",
    insecure: bool = False,
    allow_private: bool | None = None,
    ca_file: str = "",
    proxy: str = "",
    prefix: str = "",
) -> Endpoint:
    """The endpoint of a registry from its settings; the defaults are those of a registry without any.

    Plain http is for ``insecure``, and for loopback hosts without a ``ca_file``. ``allow_private`` None means: only
    where ``url`` itself names localhost or a private address. Raises ValueError when ``url`` is no address of a
    registry. Source: ``wave.md`` §2.4.1 and its vectors V31.
    """
    if url:
        base = url.rstrip("/").removesuffix("/v2")
    elif registry == DOCKER_HUB:
        base = "https://registry-1.docker.io"
    else:
        plain = insecure or (_is_loopback(URL(f"//{registry}").host or "") and not ca_file)
        scheme = "http" if plain else "https"
        base = f"{scheme}://{registry}"
    try:
        host = parse_url(base).host or ""
    except UpstreamError as err:
        raise ValueError(f"endpoint of registry {registry!r}: {err}; expected http(s)://host[:port]") from None
    if allow_private is None:
        allow_private = bool(url) and (host == "localhost" or (_is_literal(host) and not is_public(host)))
    return Endpoint(registry, base, allow_private, ca_file, proxy, prefix=prefix)


def _is_literal(host: str) -> bool:
    try:
        ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    return host == "localhost" or (_is_literal(host) and ip_address(host.partition("%")[0]).is_loopback)


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet: not loopback, private, link-local, shared, multicast or reserved,
    nor one at which a cloud serves its own machines.

    An IPv6 address that stands for an IPv4 one (mapped, 6to4, NAT64) is what that one is.
    """
    ip = ip_address(address.partition("%")[0])
    if isinstance(ip, IPv6Address):
        inner = IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else ip.ipv4_mapped or ip.sixtofour
        if ip.is_site_local:
            return False
        ip = inner or ip
    if any(ip in network for network in _OF_CLOUDS):
        return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


class _PrivateAddress(OSError):
    """Refused by the guard. The text is always the same, so that it stays whole when a name has several addresses."""

    def __init__(self) -> None:
        super().__init__("a private or loopback address")


def _guarded_socket(info: aiohttp.AddrInfoType) -> socket.socket:
    """A socket for an address that is about to be connected to: after DNS, so no second answer can differ."""
    family, kind, protocol, _, address = info
    if not is_public(address[0]):
        raise _PrivateAddress
    return socket.socket(family, kind, protocol)


def parse_url(text: str, base: URL | None = None) -> URL:
    """An absolute http(s) URL without user and password; ``text`` may be relative to ``base``.

    Raises UpstreamError. What came encoded stays so byte by byte, since signed links break otherwise.
    """
    try:
        whole = urljoin(str(base), text) if base is not None else text
        url = URL(whole, encoded=_PRINTABLE.fullmatch(whole) is not None)
        host, port = url.raw_host, url.port
        if url.scheme in ("http", "https") and host and port and _HOST.fullmatch(host) and "@" not in url.raw_authority:
            return url
    except (ValueError, IndexError):  # yarl's, for brackets without a host
        pass
    raise UpstreamError(f"{clip(text.partition('?')[0])} is not an http(s) address without user and password")


def authority_of(url: URL) -> str:
    """``host`` or ``host:port`` as it stands in the URL, in lower case."""
    return url.raw_authority.lower()


def origin_of(url: URL) -> tuple[str, str, int]:
    """Scheme, host and port: what must stay the same for a secret to be sent."""
    return url.scheme, (url.raw_host or "").lower(), url.port or 0


def retry_after_s(value: str, now: float) -> int | None:
    """The seconds that a Retry-After header asks for, from 1 to 60; None when it says nothing that we can read."""
    if _SECONDS.fullmatch(value.strip()):
        wait_s = float(value)
    else:
        try:
            moment = parsedate_to_datetime(value)
            wait_s = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() - now
        except (ValueError, TypeError, OverflowError):
            return None
    return min(max(ceil(wait_s), 1), _MAX_RETRY_AFTER_S)


Session = aiohttp.ClientSession


def unix_session(path: str) -> Session:
    """A session with a server on a Unix socket, over any number of connections; bodies and headers stay as they are."""
    return aiohttp.ClientSession(
        connector=aiohttp.UnixConnector(path=path, limit=0),
        timeout=aiohttp.ClientTimeout(total=None),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
    )


async def unix_connection(path: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A bare connection to a server on a Unix socket; the caller closes it. Raises OSError."""
    return await asyncio.open_unix_connection(path)


@dataclass(frozen=True, slots=True)
class _Policy:
    """What a connection may do. Each has a session of its own: a pooled connection never crosses over."""

    allow_private: bool = False
    ca_file: str = ""
    proxy: str = ""


class Egress:
    """Requests to the configured registries and to whatever they point at. Belongs to one event loop.

    Timeouts are seconds: ``connect`` covers DNS and TLS, ``response`` the wait for an answer's head, ``idle`` the pause
    between two reads of its body. With ``offline`` no connection is opened but to this server itself: every other
    request raises Offline. Raises OSError when a ``ca_file`` can't be read or holds no certificate.
    """

    def __init__(
        self,
        endpoints: Mapping[str, Endpoint],
        *,
        connect_timeout_s: float = 10.0,
        response_timeout_s: float = 30.0,
        idle_timeout_s: float = 30.0,
        offline: bool = False,
    ) -> None:
        self._offline = offline
        self._endpoints = dict(endpoints)
        self._by_place: dict[tuple[str, int], Endpoint] = {}
        for endpoint in self._endpoints.values():
            self._by_place.setdefault(origin_of(parse_url(endpoint.url))[1:], endpoint)
        self._connect_timeout_s = connect_timeout_s
        self._response_timeout_s = response_timeout_s
        self._idle_timeout_s = idle_timeout_s
        self._timeout = aiohttp.ClientTimeout(total=None, connect=connect_timeout_s, sock_read=response_timeout_s)
        # While a body is sent nothing is read, so that would count as a pause.
        self._sending_timeout = aiohttp.ClientTimeout(total=None, connect=connect_timeout_s)
        self._sessions: dict[_Policy, aiohttp.ClientSession] = {}
        self._trusts = {e.ca_file: _trust(e.ca_file) for e in self._endpoints.values() if e.ca_file}

    @property
    def configured(self) -> frozenset[str]:
        """The registries that have settings of their own."""
        return frozenset(self._endpoints)

    @property
    def own(self) -> frozenset[str]:
        """The names of this server itself."""
        return frozenset(host for host, endpoint in self._endpoints.items() if endpoint.is_own)

    def endpoint(self, registry: str) -> Endpoint:
        """Where that registry is reached: as configured, else by its name."""
        return self._endpoints.get(registry) or endpoint_for(registry)

    async def request(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        endpoint: Endpoint | None = None,
        body: Body | None = None,
    ) -> aiohttp.ClientResponse:
        """One hop: the answer as it is, a redirect too, body undecoded. The caller closes or releases it.

        The connection follows the rules of ``endpoint`` when the URL is on its host and port, else those of the
        configured registry that is there, else it goes to public addresses only.
        Raises AddressRefused, UpstreamUnavailable (no connection, TLS), UpstreamTimeout, UpstreamError (not HTTP).
        """
        return await self._hop(method, parse_url(url), headers or {}, endpoint, body)

    async def follow(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        endpoint: Endpoint | None = None,
        body: Body | None = None,
    ) -> aiohttp.ClientResponse:
        """The answer at the end of at most 5 redirects, each of them checked as ``request`` does.

        Authorization goes only where scheme, host and port are still those of ``url``, and no hop leads from https to
        http unless a configured endpoint is there. Raises what ``request`` raises; UpstreamError also for a loop.
        """
        target = parse_url(url)
        home, sent, seen = origin_of(target), dict(headers or {}), {target}
        for _ in range(MAX_REDIRECTS + 1):
            response = await self._hop(method, target, sent, endpoint, body)
            if response.status not in _REDIRECTS:
                return response
            location = response.headers.get("Location")
            response.release()
            target = self.next_hop(target, location, endpoint)
            if target in seen:
                raise UpstreamError(f"{authority_of(target)} redirects in a loop")
            seen.add(target)
            if origin_of(target) != home:
                sent.pop("Authorization", None)
        raise UpstreamError(f"{home[1]} redirects more than {MAX_REDIRECTS} times")

    def next_hop(self, current: URL, location: str | None, endpoint: Endpoint | None) -> URL:
        """Where a Location header of the answer from ``current`` leads. Raises UpstreamError."""
        if not location:
            raise UpstreamError(f"{authority_of(current)} redirects to nowhere: the Location header is missing")
        target = parse_url(location, current)
        if current.scheme == "https" and target.scheme == "http":
            there = self._endpoint_at(target, endpoint)
            if there is None or not there.url.startswith("http:"):
                raise UpstreamError(f"{authority_of(current)} redirects from https to http://{authority_of(target)}")
        return target

    def _endpoint_at(self, url: URL, endpoint: Endpoint | None) -> Endpoint | None:
        place = origin_of(url)[1:]
        if endpoint is not None and origin_of(URL(endpoint.url))[1:] == place:
            return endpoint
        return self._by_place.get(place)

    def _is_shut(self, endpoint: Endpoint | None) -> bool:
        return self._offline and not (endpoint is not None and endpoint.is_own)

    async def _hop(
        self,
        method: str,
        url: URL,
        headers: Mapping[str, str],
        endpoint: Endpoint | None,
        body: Body | None = None,
    ) -> aiohttp.ClientResponse:
        there = self._endpoint_at(url, endpoint)
        if self._is_shut(there):
            raise Offline(
                f"this proxy is offline ([upstream] offline = true): {authority_of(url)} is not asked "
                "for what is not stored here"
            )
        policy = _Policy(there.allow_private, there.ca_file, there.proxy) if there else _Policy()
        sent = {"User-Agent": _USER_AGENT, "Accept-Encoding": "identity", **headers}
        broken: list[WaveError] = []
        try:
            # aiohttp measures pauses; the sum of both limits ends a head that comes byte by byte.
            async with asyncio.timeout(self._connect_timeout_s + self._response_timeout_s) as limit:
                response = await self._session(policy).request(
                    method,
                    url,
                    headers=sent,
                    data=self._moving(body(), limit, broken) if callable(body) else body,
                    timeout=self._timeout if body is None else self._sending_timeout,
                    allow_redirects=False,
                    proxy=policy.proxy or None,
                )
        except (aiohttp.ClientError, OSError) as err:
            raise broken[0] if broken else self._translate(err, authority_of(url), there) from err
        self._limit_pauses(response)
        return response

    async def _moving(
        self, body: AsyncIterable[bytes], limit: asyncio.Timeout, broken: list[WaveError]
    ) -> AsyncGenerator[bytes, None]:
        """The pieces of ``body``, each of which the other side has to take within the idle timeout.

        What reading them raises is added to ``broken`` as well, since aiohttp takes it for a trouble of the connection.
        How long reading them takes is for ``body`` to limit.
        """

        def allow(pause_s: float | None) -> None:
            with suppress(RuntimeError):  # the answer has come before all was sent
                limit.reschedule(None if pause_s is None else asyncio.get_running_loop().time() + pause_s)

        try:
            allow(None)
            async for chunk in body:
                allow(self._idle_timeout_s)
                yield chunk
                allow(None)
        except WaveError as err:
            broken.append(err)
            raise
        allow(max(_STORE_TIMEOUT_S, self._response_timeout_s))

    def _session(self, policy: _Policy) -> aiohttp.ClientSession:
        session = self._sessions.get(policy)
        if session is None:
            unguarded = policy.allow_private or policy.proxy
            connector = aiohttp.TCPConnector(
                limit=0,
                ssl=self._trust(policy.ca_file) if policy.ca_file else True,
                socket_factory=None if unguarded else _guarded_socket,
            )
            session = self._sessions[policy] = aiohttp.ClientSession(
                connector=connector,
                timeout=self._timeout,
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                read_bufsize=READ_BUFFER_BYTES,
            )
        return session

    def _trust(self, ca_file: str) -> ssl.SSLContext:
        if ca_file not in self._trusts:
            self._trusts[ca_file] = _trust(ca_file)
        return self._trusts[ca_file]

    def _limit_pauses(self, response: aiohttp.ClientResponse) -> None:
        """Put the idle timeout in the place of the response timeout, for the rest of this answer."""
        connection = response.connection
        if connection is None or connection.protocol is None:
            return
        connection.protocol.read_timeout = self._idle_timeout_s
        # While we don't read, it is not the peer who pauses; aiohttp starts the clock when reading goes on.
        if connection.transport is not None and connection.transport.is_reading():
            connection.protocol.start_timeout()

    def _translate(self, err: Exception, host: str, endpoint: Endpoint | None) -> WaveError:
        table = f'[registries."{endpoint.registry if endpoint else host}"]'
        reason = getattr(err, "strerror", None) or str(err) or type(err).__name__
        if isinstance(err, aiohttp.ClientConnectorError) and isinstance(err.os_error, _PrivateAddress):
            return AddressRefused(
                f"{host} is at a private or loopback address; where that is meant, set allow_private = true in {table}"
            )
        if isinstance(err, aiohttp.ClientConnectorDNSError):
            text = f"this machine can't resolve {host}: {reason}; check the name, or this machine's DNS and network"
            known = endpoint is not None and (endpoint.registry == DOCKER_HUB or endpoint.registry in self._endpoints)
            misspelled = getattr(err.os_error, "errno", None) in _NO_SUCH_HOST and not known
            return HostUnknown(text) if misspelled else UpstreamUnavailable(text)
        if isinstance(err, aiohttp.ClientSSLError) and "WRONG_VERSION_NUMBER" in str(err):
            return UpstreamUnavailable(f"{host} does not speak TLS; for plain http set insecure = true in {table}")
        if isinstance(err, aiohttp.ClientSSLError):
            return UpstreamUnavailable(
                f"no TLS connection to {host}: {reason}; certificates of your own go into ca_file of {table}"
            )
        if isinstance(err, aiohttp.ConnectionTimeoutError):
            return UpstreamTimeout(f"no connection to {host} within {self._connect_timeout_s:g} s")
        if isinstance(err, TimeoutError):
            return UpstreamTimeout(f"{host} did not answer within {self._response_timeout_s:g} s")
        if isinstance(err, aiohttp.ClientHttpProxyError):
            return UpstreamUnavailable(f"the proxy on the way to {host} answers with status {err.status}")
        if isinstance(err, aiohttp.InvalidURL):  # of numbers that look like an address, say
            return HostUnknown(f"{host} is no host that can be connected to: {clip(reason)}")
        if isinstance(err, aiohttp.ClientResponseError):
            return UpstreamError(f"the answer of {host} is not HTTP as we know it: {clip(reason)}")
        return UpstreamUnavailable(f"no answer from {host}: {reason}")

    async def chunks(self, response: aiohttp.ClientResponse) -> AsyncGenerator[bytes, None]:
        """The body as it arrives. The caller closes the response.

        Raises UpstreamUnavailable when it breaks off, UpstreamTimeout when nothing comes for the idle timeout.
        """
        try:
            while not response.content.at_eof():
                # Not all that has come at once: to join it would cost a copy of each byte.
                chunk, _ = await response.content.readchunk()
                if chunk:  # else a chunk of HTTP ends here, behind which the body goes on
                    yield chunk
        except TimeoutError as err:
            host = authority_of(response.url)
            raise UpstreamTimeout(f"{host} sent nothing for {self._idle_timeout_s:g} s") from err
        except (aiohttp.ClientError, OSError) as err:
            raise UpstreamUnavailable(
                f"the answer of {authority_of(response.url)} breaks off: {clip(str(err))}"
            ) from err

    async def read(self, response: aiohttp.ClientResponse, limit: int, what: str) -> bytes:
        """The whole body of a small answer, at most ``limit`` bytes; the response is released whatever happens.

        Raises UpstreamError when it is longer, UpstreamUnavailable, UpstreamTimeout. ``what`` names it in messages.
        """
        parts: list[bytes] = []
        left = limit
        try:
            async with asyncio.timeout(self._response_timeout_s + self._idle_timeout_s):
                async with aclosing(self.chunks(response)) as chunks:
                    async for chunk in chunks:
                        left -= len(chunk)
                        if left < 0:
                            raise UpstreamError(f"{what} has more than the {limit} bytes that we take")
                        parts.append(chunk)
        except TimeoutError as err:
            raise UpstreamTimeout(f"{what} did not arrive in time") from err
        finally:
            response.release()
        return b"".join(parts)

    async def explain(self, response: aiohttp.ClientResponse) -> str:
        """``HTTP <status>`` with what the body says in words, if anything; the response is released."""
        status = f"HTTP {response.status}"
        try:
            document = read_json_object(await self.read(response, _MAX_ERROR_BYTES, "an error"), "an error")
        except UpstreamError:
            return status
        match document:
            case (
                {"errors": [{"message": str(text)}, *_]}
                | {"errors": [{"code": str(text)}, *_]}
                | {"details": str(text)}
                | {"message": str(text)}
            ) if text:
                return f"{status}, {clip(text, 200)}"
        return status

    async def failure(self, response: aiohttp.ClientResponse, what: str, verb: str = "give") -> WaveError:
        """The error for an answer that is none: TooManyRequests, UpstreamFailing (5xx) or UpstreamError.

        ``verb`` is what the other side was to do with ``what``.
        """
        host = authority_of(response.url)
        wait_s = retry_after_s(response.headers.get("Retry-After", ""), time())
        said = await self.explain(response)
        if response.status == 429:
            return TooManyRequests(f"{host} limits requests, {what} has to wait ({said})", wait_s)
        if response.status >= 500:
            return UpstreamFailing(f"{host} fails to {verb} {what} ({said})")
        return UpstreamError(f"{host} does not {verb} {what} ({said})")

    async def connect(
        self, host: str, port: int, *, allow_private: bool = False, tls: bool = False, strict: bool = False
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A bare connection, for who speaks something else than our requests; the caller closes it.

        It goes to public addresses only, unless ``allow_private`` or, if not ``strict``, the configured registry that
        is there says other; and if ``strict``, to none of this machine's own.
        Raises AddressRefused, HostUnknown, UpstreamUnavailable, UpstreamTimeout, Offline.
        """
        there = self._by_place.get((host.lower(), port))
        if self._is_shut(there):
            raise Offline(f"this proxy is offline ([upstream] offline = true): no connection to {host} is made")
        context = (self._trust(there.ca_file) if there and there.ca_file else True) if tls else None
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                private = allow_private or (there is not None and there.allow_private and not strict)
                addresses = await _resolve(host, port, private=private, strict=strict)
                return await _connect_first(addresses, port, ssl=context, server_hostname=host if tls else None)
        except TimeoutError as err:
            raise UpstreamTimeout(f"no connection to {host} within {self._connect_timeout_s:g} s") from err
        except socket.gaierror as err:
            text = f"this machine can't resolve {host}: {err.strerror}"
            raise (HostUnknown if err.errno in _NO_SUCH_HOST else UpstreamUnavailable)(text) from err
        except _PrivateAddress as err:
            raise AddressRefused(f"{host} is at a private or loopback address") from err
        except (OSError, ValueError) as err:  # ValueError: a host that no name service takes
            raise UpstreamUnavailable(f"no connection to {host}:{port}: {clip(str(err))}") from err

    async def refuse_private(self, host: str, port: int) -> None:
        """Raises AddressRefused for a host that is, as far as this machine knows, at no public address.

        One that it can't resolve in a moment passes: in a network that only a proxy leads out of, that is how it is.
        """
        try:
            async with asyncio.timeout(_LOOK_UP_S):
                await _resolve(host, port, private=False, strict=True)
        except _PrivateAddress as err:
            raise AddressRefused(f"{host} is at a private or loopback address") from err
        except (OSError, ValueError):
            return

    async def close(self) -> None:
        """Close all connections; answers that are still being read break off."""
        sessions = list(self._sessions.values())
        self._sessions.clear()
        for session in sessions:
            await session.close()


def _trust(ca_file: str) -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.load_verify_locations(cafile=ca_file)
    context.set_alpn_protocols(["http/1.1"])
    return context


async def _resolve(host: str, port: int, *, private: bool, strict: bool) -> list[str]:
    """The addresses of a host that may be connected to, in the order to try. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(info[4][0]) for info in found))
    allowed = [
        address for address in addresses if private or (is_public(address) and not (strict and _is_own(address)))
    ]
    if not allowed:
        raise _PrivateAddress
    return allowed


def _is_own(address: str) -> bool:
    """Whether an address is one of this machine: what it sends there, it sends from there. Nothing is sent."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
        except OSError:  # no way leads there
            return False
        return str(probe.getsockname()[0]) == address


async def _connect_first(
    addresses: list[str], port: int, *, ssl: ssl.SSLContext | bool | None, server_hostname: str | None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to the first of these addresses that takes one. Raises OSError."""
    for address in addresses[:-1]:
        with suppress(OSError):
            return await asyncio.open_connection(address, port, ssl=ssl, server_hostname=server_hostname)
    return await asyncio.open_connection(addresses[-1], port, ssl=ssl, server_hostname=server_hostname)

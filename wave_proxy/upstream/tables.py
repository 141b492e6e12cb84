"""From the configuration's registry tables, as plain values, to endpoints, logins and limits."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from wave_proxy.upstream.credentials import Credentials, Login, table_of
from wave_proxy.upstream.egress import Endpoint, endpoint_for
from wave_proxy.upstream.limits import Limit, Limits


class RegistryTable(Protocol):
    """One ``[registries."host"]`` table, or one ``[registries."host/prefix"]`` with a login only."""

    @property
    def endpoint(self) -> str: ...
    @property
    def username(self) -> str: ...
    @property
    def users(self) -> tuple[str, ...]: ...
    @property
    def insecure(self) -> bool: ...
    @property
    def allow_private(self) -> bool | None: ...
    @property
    def ca_file(self) -> Path | None: ...
    @property
    def proxy(self) -> str: ...
    @property
    def prefix(self) -> str: ...
    @property
    def max_connections(self) -> int | None: ...
    @property
    def max_bytes_per_second(self) -> int | None: ...
    def read_password(self) -> str:
        """The password, from wherever the table says it is. Raises OSError when its file can't be read."""


class _Secret(Protocol):
    def get_secret_value(self) -> str: ...


def read_endpoints(tables: Mapping[str, RegistryTable]) -> dict[str, Endpoint]:
    """Where each configured registry is reached, by its host in image names."""
    return {
        host: endpoint_for(
            host,
            url=table.endpoint,
            insecure=table.insecure,
            allow_private=table.allow_private,
            ca_file=str(table.ca_file or ""),
            proxy=table.proxy,
            prefix=table.prefix,
        )
        for host, table in _of_hosts(tables)
    }


def with_own(endpoints: Mapping[str, Endpoint], authority: str, url: str) -> dict[str, Endpoint]:
    """These endpoints and our own, ``authority`` in image names, which is reached at ``url`` unless a table says so."""
    own = endpoints.get(authority)
    if own is None:
        own = endpoint_for(authority, url=url, insecure=url.startswith("http://"), allow_private=True)
    # The first one, for it may be where another registry is configured to be reached.
    return {authority: replace(own, is_own=True), **{host: e for host, e in endpoints.items() if host != authority}}


def own_login(authority: str, secret: _Secret) -> dict[str, Login]:
    """The login of our own parts to our own registry; none without a secret."""
    password = secret.get_secret_value()
    return {authority: Login("_builder", password)} if password else {}


def read_credentials(tables: Mapping[str, RegistryTable], own: Mapping[str, Login] | None = None) -> Credentials:
    """The logins of the registries that have a user, and ``own`` ones. Raises OSError for an unreadable password."""
    found = {
        place: Login(table.username, table.read_password(), table_of(place))
        for place, table in tables.items()
        if table.username
    }
    return Credentials({**(own or {}), **found}, {place: tables[place].users for place in found})


def read_limits(tables: Mapping[str, RegistryTable], max_connections: int | None, workers: int) -> Limits:
    """One worker's part of the registries' limits; ``max_connections`` is for those that say nothing of their own."""
    limits = {
        host: Limit(table.max_connections or max_connections, table.max_bytes_per_second).share(workers)
        for host, table in _of_hosts(tables)
    }
    return Limits(limits, Limit(max_connections).share(workers))


def _of_hosts(tables: Mapping[str, RegistryTable]) -> Iterable[tuple[str, RegistryTable]]:
    return ((place, table) for place, table in tables.items() if "/" not in place)

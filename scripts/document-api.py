"""Prints docs/api.md: every endpoint of the API, from the declarations beside the code that answers."""

import sys
from collections.abc import Iterator
from typing import Any, cast

from api.containers import Containers
from api.credentials import CredentialChecks
from api.endpoints import Described, declared, describe
from api.images.inspections import Inspections
from api.jobs.builds import Builds
from api.jobs.mirrors import Mirrors
from api.jobs.scans import Scans
from api.metrics import UsageMetrics
from api.pages.assets import Assets
from api.pages.builds import BuildPages
from api.pages.containers import ContainerPages
from api.pages.inspection import InspectionPages
from api.pages.landing import Landing
from api.pages.mirrors import MirrorPages
from api.pages.reference import ReferencePage
from api.pages.scans import ScanPages
from api.reference import Reference
from api.service import Health, favicon, robots, service_info

_JOBS = (Containers, Builds, Mirrors, Scans, Inspections, CredentialChecks)
_PAGES = (BuildPages, ContainerPages, MirrorPages, ScanPages, InspectionPages, Assets)
_SERVICE = (Reference, ReferencePage, Health, Landing)

_HEAD = """\
# API

<!-- Written by `make docs` from the endpoints in api/; edit what they say of themselves there. -->

A server tells itself what it answers: `/openapi` is a page to read all of it, with every member of every document, and
to send requests from; `/openapi.json` is the same as an OpenAPI 3.1 document. This page is a list to begin with.

It is the API of Seqera's Wave. Members without a value are left out of answers. In requests, unknown members are
ignored, null and empty text mean that a member is absent, a single value stands for an array of one, and digits in a
string for a number. Errors have a JSON body with `message`, but for 401, most of 404, and `GET /`, whose body is empty.
Every endpoint also answers 405 (to another method, to crawlers, and where the operator has closed it), 500 and 503.
Images are pulled at `/v2/`, as the OCI distribution specification has it.
"""


def page() -> str:
    """The whole page."""
    groups: dict[str, list[Described]] = {}
    for one in map(describe, _handlers()):
        groups.setdefault(one.endpoint.group, []).append(one)
    parts = [_HEAD]
    for name, endpoints in groups.items():
        parts += [f"\n## {name}\n\n| | | answers |\n|---|---|---|\n", *map(_row, endpoints)]
    return "".join(parts)


def _handlers() -> Iterator[Any]:
    for kind in (*_JOBS, UsageMetrics, *_PAGES, *_SERVICE):
        if kind is UsageMetrics:  # declares its endpoints when it is made
            yield from (route.endpoint for route in UsageMetrics(cast(Any, None), cast(Any, None)).routes)
        yield from (member for member in vars(kind).values() if declared(member))
    yield from (service_info, robots, favicon)


def _row(one: Described) -> str:
    endpoint = one.endpoint
    query = "&".join(f"{parameter.name}=" for parameter in endpoint.parameters if parameter.place == "query")
    address = f"{endpoint.path}?{query}" if query else endpoint.path
    notes = (
        " *With an account.*" if endpoint.login == "account" else "",
        " *Deprecated.*" if endpoint.deprecated else "",
    )
    statuses = " ".join(str(status) for status in sorted(endpoint.answers))
    return f"| `{endpoint.method} {address}` | {one.summary}.{''.join(notes)} | {statuses} |\n"


if __name__ == "__main__":
    sys.stdout.write(page())

"""Requests made of the OpenAPI document by schemathesis: none ends in a bug, and no answer is outside of the document.

Half of them are about what there is: a container, a build, a mirror, a scan. The other half has whatever was generated.
"""

import asyncio
from base64 import b64encode
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from http.client import HTTPMessage
from itertools import count
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from hypothesis.strategies import SearchStrategy, booleans
from schemathesis.checks import CHECKS, load_all_checks

from bench.images import image, layer
from bench.upstream import Upstream
from tests.api_server import ApiServer
from tests.documented import check_answer
from tests.patience import PATIENCE_S
from tests.servers import Response, redis_server
from wave_proxy.image.build import PREFIXES, BuildSpec, Kind
from wave_proxy.image.scan import Vulnerability
from wave_proxy.state.builds import BuildLimits, BuildStore
from wave_proxy.state.redis import connect
from wave_proxy.state.scans import ScanReports
from wave_proxy.upstream.egress import endpoint_for

EXAMPLES = 5
ADMIN = {"Authorization": f"Basic {b64encode(b'admin:hunter2').decode()}"}
ACCOUNTS = {"admin": f"sha256:{sha256(b'hunter2').hexdigest()}"}
IDS = {"build_id": "bd-0123456789abcdef_1", "mirror_id": "mr-0123456789abcdef_1", "scan_id": "sc-0123456789abcdef_1"}

load_all_checks()
CHECKED = CHECKS.get_by_names(
    [
        "status_code_conformance",
        "content_type_conformance",
        "response_headers_conformance",
        "response_schema_conformance",
        "unsupported_method",
        "ignored_auth",
    ]
)


class Server(ApiServer):
    """One that has a registry in the place of Docker Hub, where names without a registry lead."""

    def __init__(self, redis: str, registry: Upstream) -> None:
        super().__init__(redis, accounts=ACCOUNTS, build_repository=f"{registry.address}/builds", scans=True)
        self._endpoints = {
            "docker.io": endpoint_for("docker.io", url=f"http://{registry.address}", allow_private=True),
            registry.address: endpoint_for(registry.address, allow_private=True),
        }


@dataclass
class Scene:
    """A server, its document, and what its paths may be about."""

    api: ApiServer
    schema: Any
    known: dict[str, str]
    session: requests.Session = field(default_factory=requests.Session)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with (
        redis_server(tmp_path_factory.mktemp("redis")) as redis,
        Upstream() as registry,
        Server(redis, registry) as api,
        pytest.MonkeyPatch.context() as patch,
    ):
        # How many wrong logins are too many for a minute does not depend on the machine.
        patch.setattr("wave_proxy.state.attempts.monotonic", partial(next, count(0.0, 0.5)))
        registry.add("library/busybox", image([layer({"a": "b"})]), "latest")
        asyncio.run(_do_jobs(redis))
        token = api.submit(containerImage="busybox")["containerToken"]
        schema = schemathesis.openapi.from_dict(api.request("GET", "/openapi.json").json())
        yield Scene(api, schema, {**IDS, "token": token})


async def _do_jobs(redis_url: str) -> None:
    """A build, a mirror and a scan, each done."""

    async def admit() -> None:
        pass

    async with connect(redis_url) as redis:
        store, reports = BuildStore(redis, BuildLimits(4)), ScanReports(redis)
        kinds: tuple[Kind, ...] = ("build", "mirror", "scan")
        for kind in kinds:
            spec = BuildSpec(
                "0123456789abcdef", f"a.test/{kind}:1", "FROM a\n", kind=kind, source_image="docker.io/a/b:1"
            )
            await store.submit(spec, admit)
            claim = await store.claim("test", PATIENCE_S)
            assert claim is not None
            assert claim.record.build_id == f"{PREFIXES[kind]}-0123456789abcdef_1"
            await store.append_log(claim, b"one\ntwo\n")
            await store.finish(claim, exit_status=0, digest=f"sha256:{'d' * 64}", lock=b"@EXPLICIT\n")
        await reports.keep(IDS["scan_id"], {"LOW": 1}, [Vulnerability("CVE-1", "LOW")], b"{}")


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.value)
def test_no_answer_is_a_bug_or_outside_of_the_document(scene: Scene, mode: schemathesis.GenerationMode) -> None:
    statuses: Counter[int] = Counter()
    for result in scene.schema.get_all_operations():
        operation = result.ok()
        with suppress(Unsatisfiable):  # whatever is sent there keeps to the document
            _ask(scene, operation.as_strategy(generation_mode=mode), statuses)
    wanted = 200 if mode is schemathesis.GenerationMode.POSITIVE else 400
    assert statuses[wanted] > EXAMPLES


def _ask(scene: Scene, cases: SearchStrategy[Any], statuses: Counter[int]) -> None:
    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases, booleans(), booleans())
    def ask(case: Any, is_known: bool, is_admin: bool) -> None:
        for name in case.path_parameters or {}:
            if is_known and name in scene.known:
                case.path_parameters[name] = scene.known[name]
        url = f"http://{scene.api.address}"
        headers = ADMIN if is_admin else None
        answer = case.call(base_url=url, session=scene.session, headers=headers, timeout=PATIENCE_S)
        statuses[answer.status_code] += 1
        assert answer.status_code != 500, answer.text
        checked = CHECKED if answer.content else CHECKED[:1]  # some statuses come without their document
        case.validate_response(answer, checks=checked)
        check_answer(scene.api.app, case.method, case.formatted_path, _as_ours(answer))

    ask()


def _as_ours(answer: Any) -> Response:
    headers = HTTPMessage()
    for name, values in answer.headers.items():
        for value in values:
            headers[name] = value
    return Response(answer.status_code, headers, answer.content)

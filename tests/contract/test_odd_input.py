"""Odd but legal input, and illegal input of every kind: answered as the wire facts say, and never with a 500."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from random import Random
from socket import create_connection
from typing import Any

import pytest

from tests.contract import nextflow
from tests.contract.archives import pack
from tests.contract.conftest import Service
from tests.contract.wave_cli import WaveCli, base64, headers, submission
from tests.contract.wire import Answer, Connection
from tests.patience import PATIENCE_S
from tests.servers import WaveProxy

V2, OLDER, INSPECT = "/v1alpha2/container", "/container-token", "/v1alpha1/inspect"
CREDENTIALS = "/v1alpha2/validate-creds"
IMAGE = {"containerImage": "ubuntu"}
BWA: dict[str, Any] = {"type": "CONDA", "entries": ["bwa"]}
PACKAGES = {"packages": BWA, "dryRun": True}
FILE = {"containerFile": base64("FROM ubuntu"), "dryRun": True}
LAYER = pack({"a": "1"})


@pytest.fixture
def cli(service: Service) -> WaveCli:
    """The command line's transport."""
    return WaveCli(service.address)


@pytest.fixture(scope="module")
def connection(service: Service) -> Iterator[Connection]:
    """One connection for the module."""
    with Connection(service.address) as opened:
        yield opened


def post(cli: WaveCli, document: Any, path: str = V2) -> Answer:
    return cli.post(path, json.dumps(document).encode())


def message_of(answer: Answer) -> str:
    """What a 400 says."""
    assert answer.status == 400, answer.text
    document = answer.document()
    assert list(document) == ["message"]
    return str(document["message"])


# --- legal -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [IMAGE, PACKAGES, FILE], ids=["image", "packages", "file"])
@pytest.mark.parametrize("empty", [None, ""], ids=["null", "empty"])
def test_nothing_is_the_same_as_no_member(cli: WaveCli, base: dict[str, Any], empty: str | None) -> None:
    """Null everywhere; empty text where there can be text. Older endpoints have not all of the members."""
    objects = {"containerConfig", "packages", "buildContext", "buildCompression", "freeze", "dryRun", "mirror"}
    arrays = {"containerIncludes", "scanLevels"}
    for name in {*nextflow.PROPERTIES, "buildContext", "condaFile"} - base.keys():
        if empty is None or name not in objects | arrays:
            answer = post(cli, {**base, name: empty})
            assert answer.status == 200, f"{name}: {answer.text}"


def test_objects_of_nulls_ask_for_nothing(cli: WaveCli) -> None:
    options = {
        "condaOpts": nextflow.filled(nextflow.CONDA_OPTIONS, {}),
        "pixiOpts": {"pixiImage": None, "commands": None},
        "cranOpts": {"rImage": None, "commands": None, "basePackages": None},
    }
    packages = nextflow.filled(nextflow.PACKAGES, {"type": "CONDA", "entries": ["bwa"], **options})
    compression = nextflow.filled(nextflow.COMPRESSION, {})
    assert post(cli, {"packages": packages, "buildCompression": compression, "dryRun": True}).status == 200
    assert post(cli, {**IMAGE, "containerConfig": nextflow.config(), "buildCompression": compression}).status == 200


def test_unknown_members_are_ignored_at_every_level(cli: WaveCli) -> None:
    odd = {"unheardOf": {"a": [1, None, {"b": "c"}]}, "é日本🎉": "x", "": 0}
    config = {"env": ["A=1"], "layers": [{**LAYER, **odd}], **odd}
    assert post(cli, {**IMAGE, "containerConfig": config, **odd}).status == 200
    packages = {"type": "CONDA", "entries": ["bwa"], "condaOpts": odd, **odd}
    assert post(cli, {"packages": packages, "buildCompression": odd, "dryRun": True, **odd}).status == 200
    assert post(cli, {**IMAGE, **odd}, INSPECT).status == 200


@pytest.mark.parametrize(
    "document",
    [
        {**IMAGE, "containerConfig": {"entrypoint": "/e", "cmd": "c", "env": "A=1", "layers": LAYER}},
        {**IMAGE, "containerIncludes": "acme/tools:v1"},
        {**IMAGE, "scanLevels": "LOW"},
        {"packages": {"type": "CONDA", "entries": "bwa", "channels": "bioconda"}, "dryRun": True},
        {"packages": {**BWA, "condaOpts": {"commands": "USER root"}}, "dryRun": True},
        {"packages": {"type": "CRAN", "entries": "dplyr", "cranOpts": {"commands": "USER root"}}, "dryRun": True},
    ],
    ids=["config", "includes", "levels", "packages", "Conda's commands", "R's commands"],
)
def test_a_single_value_is_an_array_of_one(cli: WaveCli, document: dict[str, Any]) -> None:
    assert post(cli, document).status == 200


@pytest.mark.parametrize(
    "document",
    [
        {**IMAGE, "towerWorkspaceId": "1234"},
        {**IMAGE, "containerConfig": {"layers": [{**LAYER, "gzipSize": str(LAYER["gzipSize"])}]}},
        {**FILE, "buildContext": {**LAYER, "gzipSize": str(LAYER["gzipSize"])}},
        {**FILE, "buildCompression": {"mode": "zstd", "level": "3"}},
    ],
    ids=["workspace", "layer", "context", "level"],
)
def test_digits_are_a_number(cli: WaveCli, document: dict[str, Any]) -> None:
    assert post(cli, document).status == 200


def test_any_text_arrives_in_the_image(service: Service, cli: WaveCli) -> None:
    words = ["é日本🎉", 'a"b\\c', "$HOME `id`", "tab\there", "two\nlines", "\u2028", "\u00e9\u0301", "x" * 100_000]
    asked = {"env": [f"V{number}={word}" for number, word in enumerate(words)], "cmd": words, "workingDir": "/é 🎉"}
    answer = cli.submit(submission({"containerConfig": asked}, containerImage="alpine", fingerprint="é🎉"))
    config = service.wave.pull(answer["targetImage"]).config["config"]
    assert config["Cmd"] == words
    assert set(asked["env"]) <= set(config["Env"])
    assert config["WorkingDir"] == "/é 🎉"
    assert json.loads(cli.get(f"{V2}/{answer['requestId']}").body)["fingerprint"] == "é🎉"


@pytest.mark.parametrize("mebibytes", [20, 40])
def test_large_bodies(cli: WaveCli, mebibytes: int) -> None:
    body = json.dumps({**IMAGE, "ignored": "x" * (mebibytes << 20)}).encode()
    assert cli.post(V2, body).status == 200


@pytest.mark.parametrize(
    "content_type",
    [None, "application/json; charset=utf-8", "text/plain", "application/x-www-form-urlencoded", "*/*", "x"],
)
def test_whatever_the_body_is_called_it_is_json(service: Service, content_type: str | None) -> None:
    named = (("Content-Type", content_type),) if content_type else ()
    body = json.dumps(IMAGE).encode()
    with Connection(service.address) as opened:
        lines = (("Host", "x"), ("Content-Length", str(len(body))), *named)
        assert opened.ask("POST", V2, lines, body).status == 200


def test_an_address_in_absolute_form(service: Service) -> None:
    """RFC 9112, 3.2.2: servers have to take what clients send to proxies."""
    with Connection(service.address) as opened:
        for url in (f"http://{service.address}/service-info", "HTTP://other.example:80/service-info?x=/v2/"):
            assert opened.ask("GET", url, headers(service.address)).status == 200
        assert opened.ask("GET", "http://other.example", headers(service.address)).status == 400  # as / does
        ping = opened.ask("GET", f"http://{service.address}/v2/", headers(service.address))
        assert ping.header("Docker-Distribution-Api-Version") == "registry/2.0"


def test_a_body_that_waits_to_be_asked_for(service: Service) -> None:
    """curl does, for more than a mebibyte, and waits a second if it is not."""
    body = json.dumps(IMAGE).encode()
    host, _, port = service.address.partition(":")
    with create_connection((host, int(port)), timeout=PATIENCE_S) as opened:
        head = f"POST {V2} HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: {len(body)}\r\n\r\n"
        opened.sendall(head.encode())
        assert opened.recv(4096) == b"HTTP/1.1 100 Continue\r\n\r\n"
        opened.sendall(body)
        assert opened.recv(4096).startswith(b"HTTP/1.1 200 OK\r\n")


def test_hundreds_at_once(service: Service, cli: WaveCli) -> None:
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda _: post(cli, IMAGE), range(200)))
    assert {answer.status for answer in answers} == {200}
    assert len({answer.document()["requestId"] for answer in answers}) == 200


# --- illegal ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "document"),
    [
        ("packages.type", {"packages": {"type": "conda", "entries": ["bwa"]}}),
        ("nameStrategy", {**FILE, "nameStrategy": "TAGPREFIX"}),
        ("scanMode", {**IMAGE, "scanMode": "REQUIRED"}),
        ("scanLevels[1]", {**IMAGE, "scanLevels": ["LOW", "high"]}),
        ("buildCompression.mode", {**FILE, "buildCompression": {"mode": "GZIP"}}),
        ("containerPlatform", {**IMAGE, "containerPlatform": "Linux/AMD64"}),
        ("buildTemplate", {**PACKAGES, "buildTemplate": "conda/Pixi:v1"}),
    ],
)
def test_words_in_another_case_are_refused_by_name(cli: WaveCli, name: str, document: dict[str, Any]) -> None:
    if name == "buildTemplate":
        assert "build template 'conda/Pixi:v1'" in message_of(post(cli, document))
    else:
        assert message_of(post(cli, document)).startswith(f"{name}: ")


ODD: tuple[Any, ...] = (
    *(0, -1, 1.5, 1e308, 2**64, 10**30, True, [], {}, [None], [[]], [{}], {"a": 1}),
    *(" ", "x", "\0", "null", "é日本🎉", "a" * 5000, "1" * 400, "../../etc/passwd", "http://169.254.169.254/", "$(id)"),
)
INNER = {
    "containerConfig": (*nextflow.CONFIG,),
    "packages": nextflow.PACKAGES,
    "buildCompression": nextflow.COMPRESSION,
    "buildContext": nextflow.LAYER,
}


def everything_odd() -> Iterator[tuple[str, dict[str, Any]]]:
    """Each member of each request with each odd value; path and body."""
    for value in ODD:
        for name in (*nextflow.PROPERTIES, "condaFile", "buildContext"):
            yield V2, {**IMAGE, name: value}
            yield V2, {**FILE, name: value}
        for outer, names in INNER.items():
            for name in names:
                inner = {**(LAYER if outer == "buildContext" else BWA), name: value}
                yield V2, {**(FILE if outer != "packages" else {"dryRun": True}), outer: inner}
        for name in ("containerImage", "towerAccessToken", "towerEndpoint", "towerWorkspaceId"):
            yield INSPECT, {**IMAGE, name: value}
        for name in ("userName", "password", "registry"):
            yield CREDENTIALS, {"userName": "u", "password": "p", "registry": "quay.io", name: value}


def test_no_odd_value_breaks_anything(service: Service, connection: Connection) -> None:
    seen = set()
    for path, document in everything_odd():
        body = json.dumps(document).encode()
        answer = connection.ask("POST", path, headers(service.address, body), body)
        seen.add(answer.status)
        assert answer.status in (200, 400, 401, 501), f"{path} {document} {answer.status} {answer.text[:300]}"
        if answer.status in (400, 501):
            assert list(answer.document()) == ["message"]
            assert len(answer.body) < 4000, answer.text
    assert {200, 400} <= seen


@pytest.mark.parametrize(
    "body",
    [b"", b"null", b"[]", b"1", b'"x"', b"{", b"{}{}", b"\xff\xfe", b"\xef\xbb\xbf{}", b'{"a":' * 3000],
    ids=lambda body: repr(body[:8]),
)
@pytest.mark.parametrize("path", [V2, OLDER, INSPECT, CREDENTIALS, "/validate-creds"])
def test_bodies_that_are_no_object(cli: WaveCli, path: str, body: bytes) -> None:
    assert message_of(cli.post(path, body)).startswith("The request body ")


IDS = (
    "x",
    "%00",
    "..%2f..",
    "a" * 5000,
    "0" * 32,
    f"bd-{'0' * 16}_{'9' * 400}",
    "mr-x",
    "sc-",
    "%ff",
    "*",
    "%0a",
)
READ = {
    404: (
        *(f"{V2}/{{}}", f"{V2}/{{}}/status", f"{OLDER}/{{}}", "/view/containers/{}"),
        *(f"/v1alpha1/builds/{{}}{what}" for what in ("", "/status", "/logs", "/condalock")),
        *(f"/v1alpha1/mirrors/{{}}{what}" for what in ("", "/logs")),
    ),
    501: tuple(f"/v1alpha1/scans/{{}}{what}" for what in ("", "/logs", "/spdx")),
}


@pytest.mark.parametrize("status", READ)
def test_ids_that_are_none(service: Service, connection: Connection, status: int) -> None:
    """501 is of a server that has no scanner."""
    for path in READ[status]:
        for text in IDS:
            answer = connection.ask("GET", path.format(text), headers(service.address))
            assert answer.status == status or "%2f" in text, f"{path} {text[:40]} {answer.status}"
            assert answer.status < 500 or status == 501


def test_noise_as_bodies(service: Service, connection: Connection) -> None:
    """Bytes of a real request, some of them changed."""
    seed = Random().randrange(1 << 32)
    random, body = Random(seed), submission(nextflow_config(), containerImage="ubuntu")
    for _ in range(300):
        noise = bytearray(body)
        for _ in range(random.randint(1, 6)):
            noise[random.randrange(len(noise))] = random.randrange(256)
        answer = connection.ask("POST", V2, headers(service.address, bytes(noise)), bytes(noise))
        assert answer.status < 500, f"seed {seed}: {bytes(noise)!r} {answer.text}"


def nextflow_config() -> dict[str, Any]:
    return {"containerConfig": {"env": ["A=1"], "cmd": ["a", "b"], "workingDir": "/w", "layers": []}}


def test_nothing_of_all_this_was_a_surprise(service: Service) -> None:
    """The last test of the module: what nobody foresaw would be in the log."""
    wave: WaveProxy = service.wave
    assert "request failed" not in wave.stderr
    assert "Traceback" not in wave.stderr

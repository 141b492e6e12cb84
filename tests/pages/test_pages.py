"""What pages tell: the facts of the API, whatever characters they have. The test builds."""

from base64 import b64encode
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from random import Random
from time import time
from typing import Any
from urllib.parse import urlencode

import pytest

from bench.images import image, index, layer
from bench.upstream import Upstream
from tests.api_server import ApiServer
from tests.identified import issued
from tests.pages.html import Page, read_page
from tests.patience import PATIENCE_S
from tests.servers import Response, redis_server
from wave_proxy.image.build import BuildSpec, Compression
from wave_proxy.image.request import ContainerRequest, Identity
from wave_proxy.image.scan import Severity, Vulnerability, count_severities
from wave_proxy.state.builds import BuildLimits, BuildStore, Claim
from wave_proxy.state.redis import connect
from wave_proxy.state.scans import ScanReports
from wave_proxy.state.tokens import TokenStore

EVIL = """</pre></script><script>alert("1")</script><img src=x onerror='alert(1)'> & {{ 7 * 7 }}"""
BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
PLATFORM = "https://api.platform.test"
DIGEST = f"sha256:{'d' * 64}"
BASE = image([layer({"base": "1"})])
ADDED = layer({"added": "1"})


@dataclass(frozen=True)
class Scene:
    """A server with a registry; ``redis`` is where a builder finds its builds."""

    api: ApiServer
    redis: str
    registry: Upstream

    @property
    def base(self) -> str:
        return f"{self.registry.address}/library/base:1.0"

    def view(self, path: str) -> Page:
        """A page that is there."""
        answer = self.api.request("GET", f"/view/{path}")
        assert answer.status == 200, answer.body
        return read_page(answer)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with (
        redis_server(tmp_path_factory.mktemp("redis")) as redis,
        Upstream() as registry,
        ApiServer(
            redis, upstreams=[registry.address], build_repository=f"{registry.address}/builds", scans=True
        ) as api,
    ):
        registry.add("library/base", BASE, "1.0")
        platforms = ("linux/amd64", "linux/arm64")
        registry.add("library/multi", index([image([layer({"a": name})], platform=name) for name in platforms]), "1.0")
        yield Scene(api, redis, registry)


class Builder:
    """Builds as they are wanted."""

    def __init__(self, store: BuildStore, reports: ScanReports) -> None:
        self.store = store
        self.reports = reports
        self._random = Random()

    async def start(self, **changes: Any) -> Claim:
        """A build that runs."""

        async def admit() -> None:
            pass

        container_id = self.random_hex()
        spec = BuildSpec(container_id, f"wave.example:9090/local/build:{container_id}", "FROM scratch\n")
        record, _ = await self.store.submit(replace(spec, **changes), admit)
        return await self.claim(record.build_id)

    def random_hex(self) -> str:
        """Of 8 bytes."""
        return self._random.randbytes(8).hex()

    async def claim(self, job_id: str) -> Claim:
        """That job; others, which tests have left, are ended."""
        while True:
            claim = await self.store.claim("test", PATIENCE_S)
            assert claim is not None
            if claim.record.build_id == job_id:
                return claim
            await self.store.finish(claim, exit_status=1, reason="left over")


@pytest.fixture
async def builder(scene: Scene) -> AsyncIterator[Builder]:
    async with connect(scene.redis) as redis:
        yield Builder(BuildStore(redis, BuildLimits(1000)), ScanReports(redis))


def commands(page: Page) -> list[str]:
    """What the page has to type."""
    lines = page.text.splitlines()
    return [line for line in lines if line.startswith(("docker pull ", "docker run ", "apptainer pull "))]


# --- builds ----------------------------------------------------------------------------------------------------------


async def test_a_build_from_its_beginning_to_its_end(scene: Scene, builder: Builder) -> None:
    claim = await builder.start(
        container_file=f"FROM ubuntu\nRUN echo '{EVIL}'\n",
        conda_file=f"dependencies: ['{EVIL}']\n",
        template="conda/micromamba:v2",
        compression=Compression("zstd"),
        identity=Identity(user_id=7, email="ann@example.com"),
        ip_address="192.0.2.7",
    )
    build_id, log_path = claim.record.build_id, f"/v1alpha1/builds/{claim.record.build_id}/logs"
    await builder.store.append_log(claim, f"\x1b[1mone\x1b[0m {EVIL}\ntwo".encode())
    page = scene.view(f"builds/{build_id}")
    assert page.facts()[f"Build {build_id}"] == "Running"
    assert page.facts()["Duration"] == page.facts()["Exit status"] == "-"
    assert f"RUN echo '{EVIL}'\n" in page.text
    assert f"dependencies: ['{EVIL}']\n" in page.text
    assert f"one {EVIL}\ntwo" in page.text
    size = len(f"\x1b[1mone\x1b[0m {EVIL}\ntwo")
    assert ("pre", {"id": "log", "tabindex": "0", "data-follow": f"{log_path}?offset={size}"}) in page.elements

    await builder.store.finish(claim, exit_status=0, digest=DIGEST, lock=b"@EXPLICIT\n")
    page = scene.view(f"builds/{build_id}")
    facts = page.facts()
    assert facts[f"Build {build_id}"] == "Succeeded"
    assert (facts["Digest"], facts["Exit status"], facts["Duration"]) == (DIGEST, "0", "0:00")
    assert (facts["Template"], facts["Compression"], facts["User id"]) == ("conda/micromamba:v2", "zstd", "7")
    assert page.links["the packages that were chosen"] == f"/v1alpha1/builds/{build_id}/condalock"
    assert page.links["All of it as text"] == log_path
    assert ("pre", {"id": "log", "tabindex": "0"}) in page.elements
    image = claim.record.spec.target_image
    assert commands(page) == [f"docker pull {image}", f"docker run --rm {image}"]
    assert "ann@example.com" not in page.source
    assert "192.0.2.7" not in page.source


async def test_a_build_that_failed_says_why(scene: Scene, builder: Builder) -> None:
    claim = await builder.start(format="sif")
    await builder.store.finish(claim, exit_status=137, reason=f"killed by {EVIL}")
    page = scene.view(f"builds/{claim.record.build_id}")
    assert f"Failed: killed by {EVIL}" in page.text
    assert page.facts()["Exit status"] == "137"
    assert page.facts()["Format"] == "SINGULARITY"
    assert commands(page) == []
    assert claim.record.spec.image not in page.links


async def test_a_singularity_image_is_pulled_by_its_own_program(scene: Scene, builder: Builder) -> None:
    claim = await builder.start(format="sif")
    await builder.store.finish(claim, exit_status=0, digest=DIGEST)
    page = scene.view(f"builds/{claim.record.build_id}")
    assert commands(page) == [f"apptainer pull oras://{claim.record.spec.target_image}"]


async def test_the_line_of_the_log_that_says_why(scene: Scene, builder: Builder) -> None:
    claim = await builder.start()
    await builder.store.append_log(claim, f"STEP 1\nError: no {EVIL} there\n>> failed: …\n".encode())
    await builder.store.finish(claim, exit_status=1, reason=f"not found: Error: no {EVIL} there; check its name")
    page = scene.view(f"builds/{claim.record.build_id}")
    assert ("span", {"class": "advice"}) in page.elements
    for line in ("Failed: not found\n", f"\nError: no {EVIL} there\n", "\ncheck its name\n"):
        assert line in page.text


async def test_builds_without_a_number(scene: Scene, builder: Builder) -> None:
    claim = await builder.start()
    series = claim.record.spec.series
    await builder.store.finish(claim, exit_status=1, reason="broken")
    for text in (series, series[3:]):
        answer = scene.api.request("GET", f"/view/builds/{text}")
        assert (answer.status, answer.headers["Location"]) == (307, f"/view/builds/{series}_1")
    again = await builder.start(container_id=series[3:], target_image="wave.example:9090/other:1")
    page = scene.view(f"builds/{series}")
    assert [href for text, href in page.links.items() if text.startswith("bd-")] == [
        f"/view/builds/{series}_2",
        f"/view/builds/{series}_1",
    ]
    assert f"{series}_2 Running" in page.text
    assert f"{series}_1 Failed" in page.text
    await builder.store.finish(again, exit_status=0, digest=DIGEST)


@pytest.mark.parametrize(
    ("asked", "page"),
    [
        ("bd-beac24afd572398d-1", "bd-beac24afd572398d_1"),
        ("12345-1", "12345_1"),
        ("%2F%2Fevil.test-1", ""),
        ("a%20%3Cb%3E-1", "a%20%3Cb%3E_1"),
    ],
)
def test_a_dash_before_the_number_is_put_right(scene: Scene, asked: str, page: str) -> None:
    answer = scene.api.request("GET", f"/view/builds/{asked}")
    if page:
        assert (answer.status, answer.headers["Location"]) == (301, f"/view/builds/{page}")
    else:
        assert answer.status == 404


@pytest.mark.parametrize("asked", ["bd-0123456789abcdef_1", "0123456789abcdef", "bd-1234567890123456", "x", "*"])
def test_what_is_no_build(scene: Scene, asked: str) -> None:
    page = scene.view(f"builds/{asked}")
    assert page.facts()["Unknown build"] == f"Unknown build id '{asked}'"
    assert "[build] log_retention" in page.text


def test_an_unknown_id_is_shown_as_it_is(scene: Scene) -> None:
    page = scene.view("builds/%3Cscript%3Ealert(1)%3Cb%3E")
    assert "Unknown build id '<script>alert(1)<b>'" in page.text


# --- containers ------------------------------------------------------------------------------------------------------


def test_a_container(scene: Scene) -> None:
    config = {
        "env": [f"A={EVIL}"],
        "cmd": ["sh", "-c", f"echo {EVIL}\nls"],
        "entrypoint": ["/entry"],
        "workingDir": f"/{EVIL}",
        "layers": [ADDED.inline()],
    }
    answer = scene.api.submit(
        containerImage=scene.base,
        containerConfig=config,
        fingerprint=EVIL,
        timestamp="2024-04-09T22:31:00+02:00",
        towerAccessToken=None,
    )
    page = scene.view(f"containers/{answer['requestId']}")
    facts = page.facts()
    assert facts["Image to pull"] == answer["targetImage"]
    assert commands(page)[0] == f"docker pull {answer['targetImage']}"
    assert facts["Asked for at"] == "2024-04-09 22:31 (GMT+2)"
    assert facts["Fingerprint"] == EVIL
    assert facts["Environment"] == f"A={EVIL}"
    assert facts["Working directory"] == f"/{EVIL}"
    assert f"echo {EVIL}\nls" in page.text
    assert page.links[scene.base] == f"/view/inspect?image={scene.base.replace('/', '%2F').replace(':', '%3A')}"
    assert ADDED.digest in page.text
    assert "with the request" in page.text
    assert "Seqera Platform" not in facts  # clients name one for nobody as well


@pytest.mark.parametrize(
    ("identity", "platform"),
    [
        (Identity(7, access_token="secret", endpoint=PLATFORM), PLATFORM),
        (Identity(email="ann@example.com", endpoint=PLATFORM), None),
    ],
    ids=["of a Platform", "of this server"],
)
async def test_the_platform_of_a_user(scene: Scene, identity: Identity, platform: str | None) -> None:
    now = time()
    request = ContainerRequest(scene.base, identity=identity, created=now, expires=now + 60)
    async with connect(scene.redis) as redis:
        token = await TokenStore(redis).put(request)
        page = scene.view(f"containers/{token}")
        assert page.facts().get("Seqera Platform") == platform
        assert "secret" not in page.source
        await TokenStore(redis).delete(token)
    assert scene.view(f"containers/{token}").facts().get("Seqera Platform") == platform


def test_a_container_that_is_built(scene: Scene) -> None:
    file = f'FROM scratch\nLABEL a="{EVIL}"\n'
    answer = scene.api.submit(containerFile=b64encode(file.encode()).decode())
    page = scene.view(f"containers/{answer['requestId']}")
    assert file in page.text
    assert page.links[answer["buildId"]] == f"/view/builds/{answer['buildId']}"
    waiting = scene.view(f"builds/{answer['buildId']}")
    assert waiting.facts()[f"Build {answer['buildId']}"] == "Waiting"
    assert answer["requestId"] not in waiting.source


@pytest.mark.parametrize("token", ["0" * 32, "abc", "<b>", "0" * 500])
def test_an_unknown_token(scene: Scene, token: str) -> None:
    text = f"Unknown container token: {token[:64]}"
    answer = scene.api.request("GET", f"/view/containers/{token}", headers={"Accept": "*/*"})
    assert (answer.status, answer.json(), answer.headers["Vary"]) == (404, {"message": text}, "Accept")
    answer = scene.api.request("GET", f"/view/containers/{token}", headers={"Accept": BROWSER})
    assert (answer.status, answer.headers["Vary"]) == (404, "Accept")
    page = read_page(answer)
    assert text in page.text
    assert "[tokens] retention" in page.text


async def test_what_can_be_pulled_of_a_request(scene: Scene, builder: Builder) -> None:
    tag = builder.random_hex()
    file = b64encode(f"FROM scratch\nLABEL a={tag}\n".encode()).decode()
    by_token = scene.api.submit(containerFile=file)
    durable = scene.api.submit(containerFile=file, freeze=True, buildRepository=f"{scene.registry.address}/frozen")
    paths = [f"containers/{one['requestId']}" for one in (by_token, durable)]
    waiting = [commands(scene.view(path))[:1] for path in paths]
    for answer, exit_status in ((by_token, 1), (durable, 0)):
        claim = await builder.claim(answer["buildId"])
        await builder.store.finish(claim, exit_status=exit_status, reason="broken" if exit_status else "")
    assert durable["targetImage"] not in scene.view(paths[1]).links  # it is made from no other image
    ended = [commands(scene.view(path))[:1] for path in paths]
    assert waiting == [[f"docker pull {by_token['targetImage']}"], []]
    assert ended == [[], [f"docker pull {durable['targetImage']}"]]


# --- mirrors ---------------------------------------------------------------------------------------------------------


async def test_a_mirror(scene: Scene, builder: Builder) -> None:
    claim = await builder.start(
        kind="mirror", source_image=scene.base, target_image="registry.test/base:1.0", platform="", container_file=""
    )
    mirror_id = claim.record.build_id
    await builder.store.append_log(claim, f"copy {EVIL}\n".encode())
    page = scene.view(f"mirrors/{mirror_id}")
    facts = page.facts()
    assert facts[f"Mirror {mirror_id}"] == "Running"
    assert (facts["Source"], facts["Target"], facts["Platform"]) == (scene.base, "registry.test/base:1.0", "(all)")
    assert f"copy {EVIL}\n" in page.text
    assert f"/v1alpha1/mirrors/{mirror_id}/logs?offset=" in page.source
    await builder.store.finish(claim, exit_status=1, reason=f"refused: {EVIL}")
    page = scene.view(f"mirrors/{mirror_id}")
    assert f"Failed: refused: {EVIL}" in page.text
    assert page.facts()["Exit code"] == "1"
    assert commands(page) == []


async def test_a_mirror_is_pulled_by_its_own_name(scene: Scene, builder: Builder) -> None:
    claim = await builder.start(kind="mirror", source_image=scene.base, target_image="registry.test/done:1.0")
    await builder.store.finish(claim, exit_status=0, digest=DIGEST)
    page = scene.view(f"mirrors/{claim.record.build_id}")
    assert commands(page) == ["docker pull registry.test/done:1.0", "docker run --rm registry.test/done:1.0"]


async def test_the_container_of_a_mirror_is_made_from_its_source(scene: Scene, builder: Builder) -> None:
    target = "registry.test/copied:1.0"
    claim = await builder.start(kind="mirror", source_image=scene.base, target_image=target)
    await builder.store.finish(claim, exit_status=0, digest=DIGEST)
    now = time()
    request = ContainerRequest(target, build_id=claim.record.build_id, mirror=True, created=now, expires=now + 60)
    async with connect(scene.redis) as redis:
        facts = scene.view(f"containers/{await TokenStore(redis).put(request)}").facts()
    assert (facts["Image to pull"], facts["Made from"]) == (target, scene.base)


@pytest.mark.parametrize("asked", ["mr-0123456789abcdef_1", "mr-0123456789abcdef", "x"])
def test_what_is_no_mirror(scene: Scene, asked: str) -> None:
    page = scene.view(f"mirrors/{asked}")
    assert page.facts()["Unknown mirror"] == f"Unknown container mirror id '{asked}'"
    assert "[build] log_retention" in page.text


async def test_a_job_has_the_page_of_its_kind(scene: Scene, builder: Builder) -> None:
    claim = await builder.start(kind="mirror", source_image=scene.base, target_image="registry.test/other:1.0")
    assert "Unknown build id" in scene.view(f"builds/{claim.record.build_id}").text
    await builder.store.finish(claim, exit_status=1, reason="not wanted")


# --- scans -----------------------------------------------------------------------------------------------------------

FOUND = [
    Vulnerability("CVE-1", "CRITICAL", f"worst {EVIL}", "openssl", "1.0", "1.1", "https://cve.test/1"),
    Vulnerability(f"CVE-2 {EVIL}", "LOW", "mild", "zlib", "1", "", "javascript:alert(1)"),
]


async def scan(scene: Scene, builder: Builder, name: str, found: list[Vulnerability]) -> str:
    """The id of a scan of an image of that name, asked for on the page, which has found that."""
    scene.registry.add(f"library/{name}", image([layer({"name": name})]), "1.0")
    image_name = f"{scene.registry.address}/library/{name}:1.0"
    asked = scene.api.request("POST", "/view/scans", body=image_name, headers={"Content-Type": "text/plain"})
    assert asked.status == 301, asked.body
    assert scene.view(asked.headers["Location"].removeprefix("/view/")).facts()["Image"] == image_name
    scan_id = asked.headers["Location"].removeprefix("/view/scans/")
    claim = await builder.claim(scan_id)
    await builder.reports.keep(scan_id, count_severities(found), found, b"{}")
    await builder.store.append_log(claim, f"looked at {EVIL}\n".encode())
    await builder.store.finish(claim, exit_status=0)
    return scan_id


async def test_a_scan_from_the_form_to_what_it_found(scene: Scene, builder: Builder) -> None:
    scan_id = await scan(scene, builder, "bad", FOUND)
    page = scene.view(f"scans/{scan_id}")
    assert "Vulnerabilities: 1 CRITICAL, 1 LOW" in page.text
    assert ("div", {"class": "state bad"}) in page.elements
    for text in (f"worst {EVIL}", f"CVE-2 {EVIL}", "openssl", "zlib", f"looked at {EVIL}".replace("'", "")):
        assert text in page.text
    assert page.links["CVE-1"] == "https://cve.test/1"
    assert page.links["All of it as text"] == f"/v1alpha1/scans/{scan_id}/logs"
    assert page.links["all of the image, as an SPDX document"] == f"/v1alpha1/scans/{scan_id}/spdx"
    for link in ("logs", "spdx"):
        assert scene.api.request("GET", f"/v1alpha1/scans/{scan_id}/{link}").status == 200
    assert "javascript:" not in page.source
    assert scene.api.request("GET", f"/view/scans/{scan_id[:-2]}").headers["Location"] == f"/view/scans/{scan_id}"


@pytest.mark.parametrize(
    ("severity", "colour"), [("LOW", "good"), ("MEDIUM", "going"), ("HIGH", "bad"), ("UNKNOWN", "going"), ("", "good")]
)
async def test_the_worst_vulnerability_colours_a_scan(
    scene: Scene, builder: Builder, severity: Severity, colour: str
) -> None:
    found = [Vulnerability("CVE-3", severity)] if severity else []
    page = scene.view(f"scans/{await scan(scene, builder, f'has{severity.lower()}', found)}")
    assert next(attributes for tag, attributes in page.elements if "class" in attributes) == {
        "class": f"state {colour}"
    }


def test_what_is_no_scan(scene: Scene) -> None:
    assert "No scan report exists with id: sc-0123456789abcdef_1" in scene.view("scans/sc-0123456789abcdef_1").text
    answer = scene.api.request("GET", "/view/scans/sc-0123456789abcdef")
    assert (answer.status, answer.json()) == (404, {"message": "Unknown container scan id 'sc-0123456789abcdef'"})
    answer = scene.api.request("GET", "/view/scans/sc-0123456789abcdef", headers={"Accept": BROWSER})
    assert answer.status == 404
    assert "Unknown container scan id 'sc-0123456789abcdef'" in read_page(answer).text


@pytest.mark.parametrize(
    ("body", "media_type"),
    [
        ("{name}", "text/plain"),
        ("{name}", "application/x-www-form-urlencoded"),
        ("image={name}&x=1", "application/x-www-form-urlencoded"),
        ('"{name}"', "application/json"),
        ('{{"image": "{name}"}}', "application/json"),
    ],
)
async def test_ways_to_name_an_image(scene: Scene, builder: Builder, body: str, media_type: str) -> None:
    text = body.format(name=scene.base)
    answer = scene.api.request("POST", "/view/scans", body=text, headers={"Content-Type": media_type})
    assert answer.status == 301, answer.body
    assert scene.view(answer.headers["Location"].removeprefix("/view/")).facts()["Image"] == scene.base


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        ("", 400, "Missing container image"),
        ("<script>alert(1)</script>", 400, "<script>alert(1)</script>"),
        ('{"image": ', 400, "not valid JSON"),
        ('{"image": 7}', 400, "Missing container image"),
        ("127.0.0.1:1/a", 400, "allow_private"),
        ("x" * 20_000, 413, "over the limit"),
        (b"\xff\xfe", 400, "not text in UTF-8"),
    ],
)
def test_scans_that_are_refused(scene: Scene, body: str | bytes, status: int, text: str) -> None:
    answer = scene.api.request("POST", "/view/scans", body=body)
    assert answer.status == status
    page = read_page(answer)
    assert "Error processing scan request - cause: " in page.text
    assert text in page.text


@pytest.mark.parametrize(
    ("origin", "status"),
    [("http://evil.test", 403), ("null", 403), ("http://wave.example:9090", 301), ("http://{host}", 301)],
)
def test_forms_of_other_sites_are_refused(scene: Scene, origin: str, status: int) -> None:
    headers = {"Origin": origin.format(host=scene.api.address)}
    assert scene.api.request("POST", "/view/scans", body=scene.base, headers=headers).status == status


def test_without_scans_there_are_no_pages_of_them(tmp_path_factory: pytest.TempPathFactory) -> None:
    with redis_server(tmp_path_factory.mktemp("redis")) as redis, ApiServer(redis) as api:
        assert api.request("GET", "/view/scans/sc-0123456789abcdef_1").status == 501
        refused = api.request("POST", "/view/scans", body="ubuntu")
        shown = api.request("GET", "/view/scans/sc-0123456789abcdef_1", headers={"Accept": BROWSER})
        for answer in (refused, shown):
            text = read_page(answer).text
            assert (answer.status, "No images are scanned here" in text, "[scan] program" in text) == (501, True, True)
            assert "response=-" not in text
            assert "wave.scan" not in text
        assert shown.headers["Vary"] == "Accept"


# --- inspection ------------------------------------------------------------------------------------------------------


def test_an_image_is_inspected(scene: Scene) -> None:
    page = scene.view(f"inspect?image={scene.base}")
    assert BASE.digest in page.text
    assert scene.base in [attributes.get("value") for tag, attributes in page.elements if tag == "input"]


def test_one_platform_of_an_index_is_inspected(scene: Scene) -> None:
    name = f"{scene.registry.address}/library/multi:1.0"
    assert '"index": {' in scene.view(f"inspect?image={name}").text
    one = scene.view(f"inspect?image={name}&platform=linux/arm64")
    assert '"architecture": "arm64"' in one.text


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ("", ""),
        ("?image=%3Cscript%3Ealert(1)%3C/script%3E", "<script>alert(1)</script>"),
        ("?image=a&platform=%22%20onfocus=%22alert(1)", '" onfocus="alert(1)'),
        ("?image=127.0.0.1:1/a/b", "allow_private"),
        (f"?image={'x' * 5000}", "has 5000 bytes"),
    ],
)
def test_what_can_not_be_inspected(scene: Scene, query: str, text: str) -> None:
    assert text in scene.view(f"inspect{query}").text


def send(api: ApiServer, form: dict[str, str], **headers: str) -> Response:
    """The form of inspection, sent."""
    return api.request(
        "POST",
        "/view/inspect",
        body=urlencode(form),
        headers={"Content-Type": "application/x-www-form-urlencoded", **headers},
    )


@pytest.mark.parametrize(
    ("form", "query"),
    [
        ({}, ""),
        ({"image": "a/b:1", "platform": "", "token": " "}, "?image=a%2Fb%3A1"),
        ({"image": "é&x=1", "platform": "linux/arm64"}, "?image=%C3%A9%26x%3D1&platform=linux%2Farm64"),
    ],
    ids=["nothing", "an image", "an image and a platform"],
)
def test_what_is_asked_for_without_a_token_has_an_address(scene: Scene, form: dict[str, str], query: str) -> None:
    answer = send(scene.api, form)
    assert (answer.status, answer.headers["Location"]) == (303, f"/view/inspect{query}")


async def test_a_user_inspects_with_an_access_token(scene: Scene) -> None:
    token = await issued(scene.redis, "ada@example.org")
    with ApiServer(scene.redis, upstreams=[scene.registry.address], anonymous=False, scans=True) as api:
        refused = read_page(api.request("GET", f"/view/inspect?image={scene.base}"))
        assert "Missing user access token" in refused.text
        page = read_page(send(api, {"image": scene.base, "token": token}))
        assert BASE.digest in page.text
        assert token not in page.source
        assert "/view/scans" not in page.source
        wrong = f"{token[:-1]}{'a' if token[-1] != 'a' else 'b'}"
        page = read_page(send(api, {"image": scene.base, "token": wrong}))
        assert ("div", {"class": "state bad"}) in page.elements
        assert wrong not in page.source


def test_no_browser_fills_in_a_token_or_shows_it_in_an_address(scene: Scene) -> None:
    page = scene.view("inspect")
    (form,) = [attributes for tag, attributes in page.elements if tag == "form"]
    assert (form["method"], form["action"]) == ("post", "/view/inspect")
    (field,) = [attributes for tag, attributes in page.elements if attributes.get("name") == "token"]
    assert (field["type"], field["autocomplete"], field.get("value")) == ("password", "new-password", None)


@pytest.mark.parametrize(
    ("origin", "status"), [("http://evil.test", 403), ("null", 403), ("http://wave.example:9090", 303)]
)
def test_the_form_of_another_site_inspects_nothing(scene: Scene, origin: str, status: int) -> None:
    assert send(scene.api, {"image": scene.base}, Origin=origin).status == status


@pytest.mark.parametrize(("body", "status"), [("x" * 30_000, 413), (b"image=\xff", 400)])
def test_what_is_no_form(scene: Scene, body: str | bytes, status: int) -> None:
    answer = scene.api.request("POST", "/view/inspect", body=body)
    assert answer.status == status
    assert "request body" in read_page(answer).text


# --- around them -----------------------------------------------------------------------------------------------------


def test_what_pages_load_may_be_kept_for_good(scene: Scene) -> None:
    page = scene.view("inspect")
    (sheet,) = [attributes["href"] for tag, attributes in page.elements if tag == "link"]
    answer = scene.api.request("GET", sheet)
    assert (answer.status, answer.headers["Content-Type"]) == (200, "text/css; charset=utf-8")
    assert answer.headers["Cache-Control"] == "public, max-age=31536000, immutable"
    for other in ("/assets/pages.css", "/assets/..%2Frender.py", "/assets/"):
        assert scene.api.request("GET", other).status == 404


def test_head_has_the_length_of_the_page(scene: Scene) -> None:
    answer = scene.api.request("HEAD", "/view/inspect")
    assert (answer.status, answer.body) == (200, b"")
    assert int(answer.headers["Content-Length"]) == len(scene.api.request("GET", "/view/inspect").body)

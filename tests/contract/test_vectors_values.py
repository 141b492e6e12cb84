"""Vectors of values: V16, V17, V18, V20, V22, V29, V31, V32 (``wave.md`` §12)."""

import json
from pathlib import Path
from time import time
from typing import Any

import pytest

from api.answers import Outcome, submitted
from api.locations import OpenHosts, blob_digest, check_location
from api.schema import parse_submission
from builder.engines.buildkit import write_logins
from wave_proxy.errors import RequestInvalid
from wave_proxy.image.mirror import mirror_target
from wave_proxy.image.platform import known_endpoint
from wave_proxy.image.reference import parse_reference
from wave_proxy.image.request import ContainerConfig, ContainerRequest, Layer
from wave_proxy.upstream.bearer import Challenge, choose_challenge
from wave_proxy.upstream.egress import endpoint_for

HEX = "ab" * 32
TOKEN = "0123456789abcdef" * 2


# --- V16 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("location", "registry"),
    [
        pytest.param(f"docker://quay.io/v2/hello-world/blobs/sha256:{HEX}", "quay.io", id="V16 registry"),
        pytest.param(f"docker://foo.com:5000/v2/hello-world/blobs/sha256:{HEX}", "foo.com:5000", id="V16 port"),
    ],
)
def test_v16_locations_in_registries(location: str, registry: str) -> None:
    check_location(location, OpenHosts(frozenset([registry])))
    assert blob_digest(location) == f"sha256:{HEX}"


@pytest.mark.parametrize("location", ["docker://quay.io/v2/hello-world/blobs/latest", "/v2/hello-world/blobs/latest"])
def test_v16_a_location_names_registry_and_digest(location: str) -> None:
    """The service also resolves tags, and paths alone on docker.io; what is verified has to be named."""
    with pytest.raises(RequestInvalid):
        check_location(location, OpenHosts())


# --- V17 -------------------------------------------------------------------------------------------------------------

IMAGE = "quay.io/acme/tool:1"
WAVE = f"wave.example/wt/{TOKEN}/acme/tool:1"


@pytest.mark.parametrize(
    ("kind", "new", "freeze", "wanted"),
    [
        pytest.param("build", False, False, (True, WAVE, True, False), id="V17 build that was there"),
        pytest.param("build", True, False, (True, WAVE, False, False), id="V17 new build"),
        pytest.param("build", False, True, (False, IMAGE, True, False), id="V17 frozen build that was there"),
        pytest.param("build", True, True, (False, IMAGE, False, False), id="V17 new frozen build"),
        pytest.param("mirror", False, False, (False, IMAGE, True, True), id="V17 mirror that was there"),
        pytest.param("mirror", True, False, (False, IMAGE, False, True), id="V17 new mirror"),
        pytest.param("container", None, False, (True, WAVE, None, False), id="V17 container"),
    ],
)
def test_v17_answers(kind: str, new: bool | None, freeze: bool, wanted: tuple[bool, str, bool | None, bool]) -> None:
    made = Outcome(f"{kind[0]}x-1", cached=not new, succeeded=None if new else True) if new is not None else None
    request = ContainerRequest(
        IMAGE,
        build_id=made.build_id if made else "",
        freeze=freeze,
        mirror=kind == "mirror",
        created=time(),
        expires=time() + 60,
    )
    answer = submitted(TOKEN, request, "wave.example", legacy=False, built=made)
    found = ("containerToken" in answer, answer["targetImage"], answer.get("cached"), answer["mirror"])
    assert found == wanted
    assert ("expiration" in answer) is found[0]
    assert answer["freeze"] is freeze
    older = submitted(TOKEN, request, "wave.example", legacy=True, built=made)
    assert (older["containerToken"], older["targetImage"]) == (TOKEN, wanted[1])
    assert ("buildId" in older) is bool(new)


# --- V18 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param("", "https://api.cloud.seqera.io", id="V18 none, which becomes the default"),
        pytest.param("http://foo.com", "http://foo.com", id="V18 others"),
        pytest.param("https://api.tower.nf", "https://api.cloud.seqera.io", id="V18 tower"),
        pytest.param("https://api.stage-tower.net", "https://api.cloud.stage-seqera.io", id="V18 stage"),
    ],
)
def test_v18_endpoints_of_old(before: str, after: str) -> None:
    assert known_endpoint(before) == after


# --- V20 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [None, "none", "tagPrefix", "imageSuffix"])
def test_v20_repositories_stay_what_they_are(strategy: str | None) -> None:
    """As where no public repository is configured: there is no such setting here, and so no reserved words."""
    for repository in ("foo.com/alpha", "foo.com/library", "foo.com/build", "foo.com/bar/build", "bar.com/build"):
        asked = {"buildRepository": repository, "nameStrategy": strategy}
        assert parse_submission(asked, OpenHosts()).build_repository == repository
    with pytest.raises(RequestInvalid, match=r"invalid or incomplete - offending value: 'foo\.com'"):
        parse_submission({"buildRepository": "foo.com", "nameStrategy": strategy}, OpenHosts())


# --- V22 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "wanted"),
    [
        pytest.param("quay.io", "quay.io/source/image:latest", id="V22 registry"),
        pytest.param("quay.io/lib", "quay.io/lib/source/image:latest", id="V22 repository"),
        pytest.param("quay.io/lib/", "quay.io/lib/source/image:latest", id="V22 slash at the end"),
    ],
)
def test_v22_targets_of_mirrors(place: str, wanted: str) -> None:
    assert str(mirror_target(parse_reference("docker.io/source/image:latest"), place)) == wanted


# --- V29 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "version", "architecture"),
    [
        pytest.param("v2-amd64.json", "2", "", id="V29 file"),
        pytest.param("v2.1.3a-arm64.json", "2.1.3a", "", id="V29 file with a letter"),
        pytest.param("releases/pkg/2/2/8/fusion-amd64.tar.gz", "2.2.8", "amd64", id="V29 package"),
        pytest.param("pkg/2/22/fusion-arm64.tar.gz", "2.22", "arm64", id="V29 package of two parts"),
        pytest.param("pkg/2/2/8/a/fusion-arm64.tar.gz", "2.2.8.a", "arm64", id="V29 package of four parts"),
    ],
)
def test_v29_fusion(file: str, version: str, architecture: str) -> None:
    """Of a file that describes layers, which clients read, the version counts; it is no layer of an architecture."""
    layer = Layer(f"https://fusionfs.seqera.io/{file}", f"sha256:{HEX}", 1, f"sha256:{HEX}")
    assert ContainerConfig(layers=(layer,)).fusion_version == version
    if architecture:
        assert [name for name in ("amd64", "arm64") if layer.fits(name)] == [architecture]


# --- V31 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("registry", "options", "url"),
    [
        pytest.param("docker.io", {}, "https://registry-1.docker.io", id="V31 docker.io"),
        pytest.param("quay.io", {}, "https://quay.io", id="V31 quay.io"),
        *(
            pytest.param("foo.com", {"url": f"http://foo.com{end}"}, "http://foo.com", id=f"V31 http, {end or 'bare'}")
            for end in ("", "/v2", "/v2/")
        ),
    ],
)
def test_v31_where_registries_are(registry: str, options: dict[str, Any], url: str) -> None:
    assert endpoint_for(registry, **options).url == url


@pytest.mark.parametrize(
    ("header", "wanted"),
    [
        pytest.param(
            'Bearer realm="https://quay.io/v2/auth",service="quay.io"',
            Challenge("bearer", "https://quay.io/v2/auth", "quay.io"),
            id="V31 bearer",
        ),
        pytest.param(
            'Bearer realm="https://quay.io/v2/auth",service="quay.io",scope="*"',
            Challenge("bearer", "https://quay.io/v2/auth", "quay.io"),
            id="V31 scope",
        ),
        pytest.param('Basic realm="http://foo"', Challenge("basic"), id="V31 basic"),
        pytest.param("foo", None, id="V31 none"),
    ],
)
def test_v31_challenges(header: str, wanted: Challenge | None) -> None:
    assert choose_challenge([header]) == wanted


# --- V32 -------------------------------------------------------------------------------------------------------------


def test_v32_what_buildkit_finds_logins_by(tmp_path: Path) -> None:
    """A build gets the login of its cache alone; base images come through the proxy, which has the others."""
    logins = {"auths": {"docker.io": {"auth": "YTpi"}, "quay.io": {"auth": "Yzpk"}}}
    (tmp_path / "auth.json").write_text(json.dumps(logins))
    write_logins(tmp_path / "docker", tmp_path / "auth.json")
    found = json.loads((tmp_path / "docker" / "config.json").read_text())["auths"]
    assert found["https://index.docker.io/v1/"] == {"auth": "YTpi"}
    assert found["quay.io"] == {"auth": "Yzpk"}
    assert parse_reference("busybox").registry == parse_reference("docker.io/ubuntu:latest").registry == "docker.io"

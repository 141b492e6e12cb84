"""Paths of the registry, as tables, and what of them may be logged."""

import pytest

from wave_proxy.errors import DigestInvalid, MethodNotAllowed, NameInvalid, NameUnknown, WaveError
from wave_proxy.image.reference import MAX_NAME_LENGTH
from wave_proxy.serve.app import redact
from wave_proxy.serve.route import Route, is_registry_path, kind_of, parse_route

TOKEN = "0123456789abcdef0123456789abcdef"
DIGEST = f"sha256:{'ab' * 32}"
SHA512 = f"sha512:{'cd' * 64}"


@pytest.mark.parametrize(
    ("target", "route"),
    [
        ("/v2", Route("ping")),
        ("/v2/", Route("ping")),
        ("/v2/?n=1", Route("ping", query="n=1")),
        # vectors V15 of wave.md, as far as they are routes here too
        ("/v2/hello-world/manifests/latest", Route("manifest", "", "docker.io", "hello-world", "latest")),
        (f"/v2/library/hello-world/blobs/{DIGEST}", Route("blob", "", "docker.io", "library/hello-world", DIGEST)),
        (
            "/v2/github.io/biocontainers/biocontainers/manifests/v1.1",
            Route("manifest", "", "github.io", "biocontainers/biocontainers", "v1.1"),
        ),
        (f"/v2/wt/{TOKEN}/library/ubuntu/manifests/latest", Route("manifest", TOKEN, "", "library/ubuntu", "latest")),
        (f"/v2/wt/{TOKEN}/canonical/ubuntu/blobs/{DIGEST}", Route("blob", TOKEN, "", "canonical/ubuntu", DIGEST)),
        # hosts
        ("/v2/localhost/a/manifests/1", Route("manifest", "", "localhost", "a", "1")),
        ("/v2/my_host:2000/a/manifests/1", Route("manifest", "", "my_host:2000", "a", "1")),
        ("/v2/[::1]:5000/a/manifests/1", Route("manifest", "", "[::1]:5000", "a", "1")),
        ("/v2/quay.io:443/a/b/c/manifests/1", Route("manifest", "", "quay.io:443", "a/b/c", "1")),
        # the right-most words decide
        ("/v2/manifests/manifests/manifests", Route("manifest", "", "docker.io", "manifests", "manifests")),
        ("/v2/blobs/uploads/manifests/1", Route("manifest", "", "docker.io", "blobs/uploads", "1")),
        ("/v2/a/tags/list/tags/list", Route("tags", "", "docker.io", "a/tags/list", "")),
        ("/v2/tags/tags/list", Route("tags", "", "docker.io", "tags", "")),
        # references
        (f"/v2/a/manifests/{SHA512}", Route("manifest", "", "docker.io", "a", SHA512)),
        (f"/v2/a/manifests/{'t' * 128}", Route("manifest", "", "docker.io", "a", "t" * 128)),
        ("/v2/a/tags/list?n=10&last=x%2Fy", Route("tags", "", "docker.io", "a", "", "n=10&last=x%2Fy")),
        # what may be encoded and what may not make a difference
        (f"/v2/a/blobs/sha256%3A{DIGEST[7:]}", Route("blob", "", "docker.io", "a", DIGEST)),
        ("/v2/%6cibrary%2fubuntu/manifests/l%61test", Route("manifest", "", "docker.io", "library/ubuntu", "latest")),
        ("/v2/quay.io%3A443/a/manifests/1", Route("manifest", "", "quay.io:443", "a", "1")),
        (f"/v2/wt/%30{TOKEN[1:]}/a/manifests/1", Route("manifest", TOKEN, "", "a", "1")),
    ],
)
def test_routes(target: str, route: Route) -> None:
    assert is_registry_path(target)
    assert parse_route("GET", target) == parse_route("HEAD", target) == route
    assert route.is_digest == (":" in route.reference)


INVALID_NAMES = [
    # vectors V15
    "/v2/library/hello-world/foo/latest",
    "/v2/foo:bar/blobs/latest",
    # needs.md C3.1
    "/v2/../../etc/passwd",
    "/v2/../a/manifests/1",
    "/v2/a/../b/manifests/1",
    "/v2/%2e%2e%2f%2e%2e%2fetc/manifests/1",
    "/v2/%252e%252e/manifests/1",
    "/v2/a/manifests/%2e%2e",
    "/v2/a/manifests/..",
    "/v2/a\\b/manifests/1",
    "/v2/a%5c..%5cb/manifests/1",
    "/v2/%c0%ae%c0%ae/manifests/1",
    "/v2/a%00/manifests/1",
    "/v2/a%2500/manifests/1",
    "/v2/a/manifests/1%00",
    "/v2/a/manifests/1%0a",
    "/v2/a%0a/manifests/1",
    # needs.md C3.2
    "/v2/Library/ubuntu/manifests/1",
    "/v2/a//b/manifests/1",
    "/v2//a/manifests/1",
    "/v2/a/manifests/1/",
    "/v2/a/manifests/",
    "/v2/a/manifests",
    "/v2/manifests/latest",
    "/v2/tags/list",
    "/v2/a",
    "/v2/a/tags/lists",
    "/v2/a/tags/list/",
    "/v2/a/blobs/uploads/",
    "/v2/a/referrers/x",
    "/v2/_catalog",
    f"/v2/{'a' * (MAX_NAME_LENGTH + 1)}/manifests/1",
    f"/v2/{'/'.join('a' * 200)}/manifests/1",
    f"/v2/a/manifests/{'t' * 129}",
    "/v2/a/manifests/-x",
    "/v2/a-/manifests/1",
    "/v2/a/b___c/manifests/1",
    "/v2/%C3%A9/manifests/1",
    # hosts that are none
    "/v2/quay.io:0/a/manifests/1",
    "/v2/quay.io:65536/a/manifests/1",
    "/v2/quay.io:80:80/a/manifests/1",
    "/v2/user@quay.io/a/manifests/1",
    "/v2/-.io/a/manifests/1",
    "/v2/../manifests/1",
    "/v2/quay.io/manifests/1",
    "/v2/quay.io/tags/list",
    f"/v2/wt/{TOKEN}/manifests/1",
    f"/v2/wt/{TOKEN}/../a/manifests/1",
    f"/v2/wt/{TOKEN}/Ubuntu/manifests/1",
    f"/v2/wt/{TOKEN}",
]


UPLOAD = "ab" * 16


@pytest.mark.parametrize(
    ("method", "target", "route"),
    [
        ("GET", "/v2/local/a/manifests/1", Route("manifest", "", "local", "a", "1")),
        ("PUT", "/v2/local/a/b/manifests/1", Route("manifest", "", "local", "a/b", "1")),
        ("DELETE", f"/v2/local/a/blobs/{DIGEST}", Route("blob", "", "local", "a", DIGEST)),
        ("GET", "/v2/local/a/tags/list?n=1", Route("tags", "", "local", "a", "", "n=1")),
        ("GET", f"/v2/local/a/referrers/{DIGEST}", Route("referrers", "", "local", "a", DIGEST)),
        ("POST", "/v2/local/a/blobs/uploads/", Route("upload", "", "local", "a", "")),
        ("POST", "/v2/local/a/blobs/uploads?mount=x", Route("upload", "", "local", "a", "", "mount=x")),
        ("PATCH", f"/v2/local/a/blobs/uploads/{UPLOAD}", Route("upload", "", "local", "a", UPLOAD)),
        ("GET", "/v2/local/blobs/uploads/manifests/1", Route("manifest", "", "local", "blobs/uploads", "1")),
        ("GET", "/v2/local/a/blobs/uploads/tags/list", Route("tags", "", "local", "a/blobs/uploads", "")),
        ("GET", "/v2/localhost/a/manifests/1", Route("manifest", "", "localhost", "a", "1")),
        ("GET", "/v2/quay.io/local/a/manifests/1", Route("manifest", "", "quay.io", "local/a", "1")),
        ("GET", f"/v2/wt/{TOKEN}/local/a/manifests/1", Route("manifest", TOKEN, "", "local/a", "1")),
    ],
)
def test_local_repositories(method: str, target: str, route: Route) -> None:
    assert parse_route(method, target) == route


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        ("/v2/", "ping"),
        ("/v2/local/a/blobs/uploads/", "upload"),
        (f"/v2/local/a/blobs/uploads/{UPLOAD}?digest=x", "upload"),
        (f"/v2/local/a/referrers/{DIGEST}", "referrers"),
        ("/v2/local/a/manifests/1", "manifest"),
        ("/v2/local/a/blobs/uploads/manifests%2F1", "manifest"),
        ("/v2/local/a/blobs/uploads%2F", "upload"),
        ("/v2/local/a/blobs/uploads", "upload"),
        ("/v2", "ping"),
        ("/v2/local/a/tags/list?n=1", "tags"),
        ("/v1alpha2/container", "api"),
    ],
)
def test_kinds(target: str, kind: str) -> None:
    assert kind_of(target) == kind


@pytest.mark.parametrize("target", INVALID_NAMES)
def test_invalid_names(target: str) -> None:
    with pytest.raises(NameInvalid) as caught:
        parse_route("GET", target)
    assert (caught.value.status, caught.value.code) == (400, "NAME_INVALID")
    assert len(str(caught.value)) < 300


def test_forty_segments_are_a_name() -> None:
    name = "/".join("a" * 40)
    assert parse_route("GET", f"/v2/{name}/manifests/1").repository == name


@pytest.mark.parametrize(
    "digest",
    [
        "latest",
        "sha256:",
        "sha256:abc",
        f"sha256:{'a' * 63}",
        f"sha256:{'a' * 65}",
        f"sha256:{'A' * 64}",
        f"sha256:{'g' * 64}",
        f"SHA256:{'a' * 64}",
        f"sha512:{'a' * 64}",
        f"md5:{'a' * 32}",
        f"sha256:{'a' * 61}%2f..",
        f"sha256:{'a' * 63}%00",
        f"sha256:{'a' * 64}%0a",
        f":{'a' * 64}",
        f"sha256+b64:{'a' * 64}",
    ],
)
def test_invalid_digests(digest: str) -> None:
    slashed = "%2f" in digest
    for kind in ("blobs",) if digest == "latest" else ("blobs", "manifests"):
        with pytest.raises(NameInvalid if slashed else DigestInvalid) as caught:
            parse_route("GET", f"/v2/a/{kind}/{digest}")
        assert caught.value.status == 400


@pytest.mark.parametrize(
    "path",
    [
        "/v2/wt",
        "/v2/wt/",
        "/v2/wt/a1/library/ubuntu/manifests/latest",
        "/v2/wt/manifests/latest",
        f"/v2/wt/{TOKEN.upper()}/a/manifests/1",
        f"/v2/wt/{TOKEN}0/a/manifests/1",
        f"/v2/wt/{TOKEN[:-1]}/a/manifests/1",
        f"/v2/wt/{TOKEN}%0a/a/manifests/1",
        "/v2/wt/%2e%2e/a/manifests/1",
    ],
)
def test_malformed_tokens(path: str) -> None:
    with pytest.raises(NameUnknown) as caught:
        parse_route("GET", path)
    assert (caught.value.status, caught.value.code) == (404, "NAME_UNKNOWN")
    assert "was never issued, has expired or was ended, or is for another image" in str(caught.value)


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "get", "CONNECT", ""])
def test_other_methods(method: str) -> None:
    with pytest.raises(MethodNotAllowed) as caught:
        parse_route(method, "/v2/a/manifests/1")
    assert caught.value.status == 405


@pytest.mark.parametrize(
    "target", ["/", "/v1/x", "/v1alpha2/container", "/v20/", "/v2x", "/V2/", "//v2/", "/service-info?x=/v2/", "*", ""]
)
def test_paths_of_the_api(target: str) -> None:
    assert not is_registry_path(target)


def test_every_printable_path_is_a_route_or_an_error_of_ours() -> None:
    for code in range(256):
        for target in (f"/v2/a{chr(code)}b/manifests/1", f"/v2/a/manifests/a%{code:02x}b", f"/v2/%{code:02x}"):
            try:
                route = parse_route("GET", target)
            except WaveError:
                continue
            assert route.kind in ("ping", "manifest")
            assert "/." not in f"/{route.repository}"
            assert route.reference.isascii()


@pytest.mark.parametrize(
    ("target", "shown"),
    [
        ("/v2/library/ubuntu/manifests/latest", "/v2/library/ubuntu/manifests/latest"),
        (f"/v2/wt/{TOKEN}/a/manifests/1?ns={TOKEN}", "/v2/wt/0123…/a/manifests/1"),
        (f"/v2/wt/%30{TOKEN[1:]}/a/manifests/1", "/v2/wt/0123…/a/manifests/1"),
        (f"/v2%2fwt%2F{TOKEN}%2fa/manifests/1", "/v2/wt/0123…/a/manifests/1"),
        ("/a%0a%1b[31mb", "/a??[31mb"),
        (f"/v2/wt/{TOKEN[:12]}/a/manifests/1", "/v2/wt/0123…/a/manifests/1"),
        (f"/container-token/{TOKEN}", "/container-token/0123…"),
        (f"/v1alpha2/container/{TOKEN}/status", "/v1alpha2/container/0123…/status"),
        (f"/v2/a/blobs/{DIGEST}", f"/v2/a/blobs/{DIGEST}"),
        ("/v1alpha2/validate-creds?password=secret", "/v1alpha2/validate-creds"),
        ("/" + "x" * 1000, "/" + "x" * 299),
    ],
)
def test_logs_hold_no_token(target: str, shown: str) -> None:
    assert redact(target) == shown

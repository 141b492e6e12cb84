"""Image references: the service's vectors (``wave.md`` V6 and V19), and what else people type."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wave_proxy.errors import RequestInvalid
from wave_proxy.image.reference import (
    MAX_NAME_LENGTH,
    Reference,
    is_registry,
    is_repository,
    is_tag,
    parse_reference,
)

DIGEST = f"sha256:{'0a' * 32}"

V6 = [
    ("busybox", "docker.io", "library/busybox", "latest", "docker.io/library/busybox:latest"),
    ("busybox:1.2.3", "docker.io", "library/busybox", "1.2.3", "docker.io/library/busybox:1.2.3"),
    ("foo/busybox:bar", "docker.io", "foo/busybox", "bar", "docker.io/foo/busybox:bar"),
    ("docker.io/busybox", "docker.io", "library/busybox", "latest", "docker.io/library/busybox:latest"),
    ("quay.io/busybox", "quay.io", "busybox", "latest", "quay.io/busybox:latest"),
    ("quay.io/a/b/c:v1.1", "quay.io", "a/b/c", "v1.1", "quay.io/a/b/c:v1.1"),
    (
        "canonical/ubuntu@sha256:12345",
        "docker.io",
        "canonical/ubuntu",
        "sha256:12345",
        "docker.io/canonical/ubuntu@sha256:12345",
    ),
    (
        "myregistryhost:5000/fedora/httpd:version1.0",
        "myregistryhost:5000",
        "fedora/httpd",
        "version1.0",
        "myregistryhost:5000/fedora/httpd:version1.0",
    ),
    ("oras://quay.io/user/repo", "quay.io", "user/repo", "latest", "oras://quay.io/user/repo:latest"),
]

OTHERS = [
    ("docker.io/library/busybox", "docker.io", "library/busybox", "latest", "docker.io/library/busybox:latest"),
    ("index.docker.io/busybox", "docker.io", "library/busybox", "latest", "docker.io/library/busybox:latest"),
    ("registry-1.docker.io/a/b:1", "docker.io", "a/b", "1", "docker.io/a/b:1"),
    ("foo/bar", "docker.io", "foo/bar", "latest", "docker.io/foo/bar:latest"),
    ("quay.io:80/foo:latest", "quay.io:80", "foo", "latest", "quay.io:80/foo:latest"),
    ("localhost:8000/foo:latest", "localhost:8000", "foo", "latest", "localhost:8000/foo:latest"),
    ("[::1]:5000/foo", "[::1]:5000", "foo", "latest", "[::1]:5000/foo:latest"),
    (f"quay.io/foo:1.2@{DIGEST}", "quay.io", "foo", DIGEST, f"quay.io/foo@{DIGEST}"),
    (f"busybox@{DIGEST}", "docker.io", "library/busybox", DIGEST, f"docker.io/library/busybox@{DIGEST}"),
    ("quay.io/a__b/c-d.e:X_y", "quay.io", "a__b/c-d.e", "X_y", "quay.io/a__b/c-d.e:X_y"),
]


@pytest.mark.parametrize(("text", "registry", "repository", "reference", "normal"), V6 + OTHERS)
def test_parse(text: str, registry: str, repository: str, reference: str, normal: str) -> None:
    parsed = parse_reference(text)
    assert (parsed.registry, parsed.repository, parsed.reference) == (registry, repository, reference)
    assert str(parsed) == normal
    assert parsed.is_digest == ("sha256:" in text)


@pytest.mark.parametrize("text", [row[0] for row in V6 + OTHERS])
def test_normal_form_is_stable(text: str) -> None:
    parsed = parse_reference(text)
    assert parse_reference(str(parsed)) == parsed


@pytest.mark.parametrize(
    "text",
    [
        "docker:quay.io/foo:latest",
        "ubuntu: latest",
        "ubuntu:latest ",
        "   ",
        "",
        "ubuntu:",
        "ubuntu@",
        "ubuntu@latest",
        "Ubuntu",
        "foo//bar",
        "/foo",
        "foo/",
        "foo/../bar",
        "foo/./bar",
        "quay.io/",
        "quay.io:99999/foo",
        "quay.io:port/foo",
        "a@b@sha256:00",
        "foo:bar:baz",
        "foo\nbar",
        "foo:latest\n",
        "quay.io/foo\n",
        "foo?x=1",
        "foo#x",
        "foo%2e%2e/bar",
        "föö",
        f"a:{'x' * 129}",
        "a" * (MAX_NAME_LENGTH + 1),
    ],
)
def test_image_name_errors(text: str) -> None:
    with pytest.raises(RequestInvalid, match=r"^Invalid container image name — offending value: '"):
        parse_reference(text)


@pytest.mark.parametrize(
    "text", ["http://quay.io/foo:latest", "https://foo", "oras://https://quay.io/foo", "ftp://a/b"]
)
def test_repository_name_errors(text: str) -> None:
    with pytest.raises(RequestInvalid) as caught:
        parse_reference(text)
    assert str(caught.value) == f"Invalid container repository name — offending value: '{text}'"


def test_error_shows_a_long_value_cut() -> None:
    with pytest.raises(RequestInvalid) as caught:
        parse_reference("Z" * 100_000)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "host", ["localhost", "foo.com", "foo.com:8000", "127.0.0.1:1", "[::1]", "[2001:db8::1]:443", "a_b"]
)
def test_registry_host(host: str) -> None:
    assert is_registry(host)


@pytest.mark.parametrize(
    "host",
    [
        "",
        "foo.com:xywz",
        "foo.com:800o",
        "http://foo.com",
        "http:foo.com",
        "http:foo.com:80",
        "a:0",
        "a.b:123456",
        "a.b:" + "1" * 5000,
        "[1]",
        "[::1::2]:5",
        "a:65536",
        "-a",
        "a-",
        "a/b",
        "a\n",
        "[::1",
    ],
)
def test_no_registry_host(host: str) -> None:
    assert not is_registry(host)


@pytest.mark.parametrize(
    ("name", "legal"),
    [
        ("a", True),
        ("a/b/c", True),
        ("a.b_c__d-e--f", True),
        ("a" * MAX_NAME_LENGTH, True),
        ("a" * (MAX_NAME_LENGTH + 1), False),
        ("", False),
        ("A", False),
        ("a//b", False),
        ("a/", False),
        ("/a", False),
        (".a", False),
        ("a.", False),
        ("a..b", False),
        ("a___b", False),
        ("a/..", False),
        ("a\n", False),
    ],
)
def test_repository(name: str, legal: bool) -> None:
    assert is_repository(name) == legal


@pytest.mark.parametrize(
    ("tag", "legal"),
    [
        ("latest", True),
        ("_x", True),
        ("A.b-c", True),
        ("x" * 128, True),
        ("x" * 129, False),
        ("", False),
        (".x", False),
        ("-x", False),
        ("a/b", False),
        ("a:b", False),
        ("a\n", False),
    ],
)
def test_tag(tag: str, legal: bool) -> None:
    assert is_tag(tag) == legal


def test_name_and_reference() -> None:
    assert Reference("quay.io", "a/b", "1").name_and_reference == "a/b:1"
    assert Reference("quay.io", "a/b", DIGEST).name_and_reference == f"a/b@{DIGEST}"


@given(st.text(alphabet="aA0./:@-_ \n%é[]", max_size=40))
def test_any_text_is_refused_or_normalised(text: str) -> None:
    try:
        parsed = parse_reference(text)
    except RequestInvalid:
        return
    assert parse_reference(str(parsed)) == parsed
    assert is_registry(parsed.registry)
    assert is_repository(parsed.repository)

"""The reason of a failed build, from what real tools write when they fail."""

import pytest

from builder.failures import BuildFailed, classify, timed_out

BUILDAH = 'error building at STEP "RUN {0}": error while running runtime: exit status {1}\nERRO[0003] exit status {1}'


@pytest.mark.parametrize(
    ("log", "status", "reason"),
    [
        ("cc1plus: out of memory allocating 65536 bytes", 1, "out of memory: cc1plus"),
        ("Error: cannot allocate vector of size 7.5 Gb", 1, "out of memory"),
        (BUILDAH.format("make", 137), 1, "killed: probably out of memory"),
        ("whatever", 137, "killed: probably out of memory"),
        ("dd: error writing '/x': No space left on device", 1, "no space"),
        ("sh: can't fork: Resource temporarily unavailable", 2, "too many processes"),
        (
            "Error: reading manifest latest in docker.io/x/y: toomanyrequests: You have reached your limit",
            125,
            "upstream limits requests (429)",
        ),
        ("curl: (22) The requested URL returned error: 429", 22, "upstream limits requests (429)"),
        (
            'no image found in manifest list for architecture arm64, variant "v8", OS linux',
            125,
            "missing platform: a base image",
        ),
        ("no image found in image index for architecture ppc64le, OS linux", 125, "missing platform: a base image"),
        ("exec /bin/sh: exec format error", 1, "missing platform: the build runs programs of another architecture"),
        (
            "error    libmamba Could not solve for environment specs\n  nothing provides nosuch",
            1,
            "unsatisfiable packages: ",
        ),
        ("  × failed to solve requirements of environment 'default'", 1, "unsatisfiable packages"),
        (
            "Error: Cannot solve the request because of: No candidates were found for nosuch *.",
            1,
            "unsatisfiable packages",
        ),
        ("package ‘nosuch’ is not available for this version of R", 1, "unsatisfiable packages"),
        ("E: Unable to locate package nosuch", 100, "unsatisfiable packages"),
        (
            "manifest unknown: image 'docker.io/library/nosuch:latest' not found",
            125,
            "base image not found or not readable",
        ),
        (
            "initializing source docker://x: registry 'x' denies access to repository 'y' (HTTP 401)",
            125,
            "base image not found or not readable",
        ),
        ('checking on sources under "/c": copier: stat: "/nosuch": no such file or directory', 125, "missing file"),
        (
            'Error: creating build container: writing blob: storing blob to file "/x": happened during read: '
            "unexpected EOF",
            125,
            "base image can't be read: a layer broke off while it was fetched (unexpected EOF)",
        ),
        (
            "manifest unknown: the build of this image has failed (bd-1_1): out of memory: the build used 4 GB\n"
            "Its log ends with:\n>> failed: out of memory: the build used 4 GB",
            125,
            "base image not found or not readable: manifest unknown: the build of this image has failed (bd-1_1): out",
        ),
        (
            "network: this machine can't resolve nosuch.org: Name or service not known\n"
            'Error: building at STEP "ADD https://nosuch.org/x /x": Bad Gateway',
            125,
            "no network: this machine can't resolve nosuch.org: Name",
        ),
        (
            'network: refused by wave-proxy: 169.254.169.254:80 is private; add "x" to [build]\nfailed to solve',
            1,
            "network refused: 169.254.169.254:80 is private; add",
        ),
        ("wget: bad address 'example.com'", 1, "no network"),
        (BUILDAH.format("false", 1), 1, "RUN false ended with exit status 1"),
        (BUILDAH.format("/bin/sh -c nosuch", 127), 1, "RUN /bin/sh -c nosuch ended with exit status 127"),
        ("Error: unknown instruction: FORM", 125, "unknown instruction: FORM (exit status 125)"),
        ("nothing of the kind", 3, "the build ended with exit status 3"),
        ("", 1, "the build ended with exit status 1"),
    ],
)
def test_reason(log: str, status: int, reason: str) -> None:
    found = classify(f"step 1\n{log}\n", status)
    assert found.startswith(reason)
    assert "\n" not in found


IMAGE = "quay.io/nosuch/img"
READING = f"{IMAGE}:1: reading manifest 1 in {IMAGE}: "
UNRESOLVED = (
    "this machine can't resolve quay.io: Name or service not known; check the name, or this machine's DNS and network"
)
DENIED = (
    "registry 'quay.io' denies access to repository 'nosuch/img' (HTTP 401, 'access to the requested resource is not "
    'authorized\'); if it exists and is private, set username and password in [registries."quay.io"]'
)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (f"name unknown: {UNRESOLVED}", f"base image can't be read: {READING}name unknown: {UNRESOLVED}"),
        (
            "received unexpected HTTP status: 503 Service Unavailable",
            f"base image can't be read: {READING}received unexpected HTTP status: 503 Service Unavailable",
        ),
        (f"denied: {DENIED}", f"base image not found or not readable: {READING}denied: {DENIED}"),
        (
            f"manifest unknown: image '{IMAGE}:1' not found",
            f"base image not found or not readable: {READING}manifest unknown: image '{IMAGE}:1' not found; check its "
            "name, and the login of its registry",
        ),
    ],
)
def test_what_is_said_of_a_base_image_is_kept_whole(said: str, reason: str) -> None:
    assert classify(f"Error: creating build container: initializing source docker://{READING}{said}\n", 125) == reason


def test_what_ran_out_comes_before_what_failed_because_of_it() -> None:
    log = "write: No space left on device\nerror libmamba Could not solve for environment specs\n"
    assert classify(log, 1).startswith("no space")


def test_only_the_end_counts() -> None:
    assert classify("429 Too Many Requests\n" + "line\n" * 100, 1) == "the build ended with exit status 1: see its log"


def test_long_lines_are_cut_and_cost_little() -> None:
    assert len(classify("copier: stat " * 5000 + "\nerror: " + "x" * 50_000, 1)) < 400


def test_braces_in_a_log_are_text() -> None:
    assert "{0.__class__}" in classify("exec {0.__class__}: exec format error", 1)


def test_a_failure_never_has_status_zero() -> None:
    assert BuildFailed("x", 0).exit_status == 1
    assert timed_out(900).exit_status == 124
    assert "900 s" in timed_out(900).reason

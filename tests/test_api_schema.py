"""The body of container requests: what is read, and what every broken rule is called."""

import math
from typing import Any

import orjson
import pytest

from api.answers import described, filled, format_instant, format_seconds, parse_timestamp
from api.body import MAX_COMMAS, decode_object
from api.building.planning import wants_build
from api.locations import MAX_URL_CHARS, OpenHosts, check_location
from api.rules import check_known, check_rules, check_supported
from api.schema import (
    MAX_ARGUMENT_BYTES,
    MAX_ITEMS,
    MAX_LAYERS,
    MAX_NAME_CHARS,
    MAX_REPORTED,
    MAX_TEXT_BYTES,
    Submission,
    parse_submission,
)
from bench.images import layer
from wave_proxy.errors import NotImplementedHere, RequestInvalid
from wave_proxy.image.request import ContainerConfig, ContainerRequest, Identity, Layer
from wave_proxy.state.tokens import TokenRecord

HEX = "0123456789abcdef" * 4
DIGEST = f"sha256:{HEX}"
NEXTFLOW = orjson.loads(
    b"""{"towerAccessToken":null,"towerRefreshToken":null,"towerWorkspaceId":null,
    "towerEndpoint":"https://api.cloud.seqera.io","containerImage":"ubuntu:latest","containerFile":null,
    "containerConfig":{"entrypoint":null,"cmd":null,"env":null,"workingDir":null,"layers":null},
    "containerPlatform":"linux/amd64","buildRepository":null,"cacheRepository":null,
    "timestamp":"2026-11-23T21:21:13.494450026Z","fingerprint":"2d2203c04b701332d6399752fee2c6f5","freeze":false,
    "format":null,"dryRun":false,"workflowId":null,"containerIncludes":null,"packages":null,"nameStrategy":null,
    "mirror":false,"scanMode":null,"scanLevels":null,"buildCompression":null,"buildTemplate":null}"""
)


def parse(**attributes: Any) -> Submission:
    return parse_submission(attributes, OpenHosts())


def refusal(**attributes: Any) -> str:
    with pytest.raises(RequestInvalid) as caught:
        parse(**attributes)
    return str(caught.value)


def a_layer(**changed: Any) -> dict[str, Any]:
    return {"location": "data:AAAA", "gzipDigest": DIGEST, "gzipSize": 3, "tarDigest": DIGEST, **changed}


def with_layer(**changed: Any) -> dict[str, Any]:
    return {"containerImage": "ubuntu", "containerConfig": {"layers": [a_layer(**changed)]}}


# --- JSON ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "words"),
    [
        pytest.param(b"", "empty", id="empty"),
        pytest.param(b" \n", "empty", id="blank"),
        pytest.param(b'{"a":', "not valid JSON", id="cut short"),
        pytest.param(b"{'a': 1}", "not valid JSON", id="single quotes"),
        pytest.param(b'{"a": NaN}', "not valid JSON", id="NaN"),
        pytest.param(b'{"a": Infinity}', "not valid JSON", id="Infinity"),
        pytest.param(b'{"a": 1} x', "not valid JSON", id="something after it"),
        pytest.param(b'{"a": "\xff"}', "not valid JSON", id="not UTF-8"),
        pytest.param('{"a": 1}'.encode("utf-16"), "not valid JSON", id="UTF-16"),
        pytest.param(b'{"a": "\\ud800"}', "not valid JSON", id="half a surrogate pair"),
        pytest.param(b'{"a":' * 100_000, "not valid JSON", id="depth bomb of objects"),
        pytest.param(b"[" * 100_000 + b"]" * 100_000, "not valid JSON", id="depth bomb of arrays"),
        pytest.param(b'{"a":[' + b"0," * MAX_COMMAS + b"0,0]}", "too many values", id="very many values"),
        pytest.param(b"[1]", "not a JSON object", id="array"),
        pytest.param(b'"text"', "not a JSON object", id="text"),
        pytest.param(b"null", "not a JSON object", id="null"),
        pytest.param(b'{"a": 1, "a": 1}', "'a' more than once", id="repeated key"),
        pytest.param(b'{"a": [{"b": {}, "\\u0062": {}}]}', "'b' more than once", id="repeated key inside, escaped"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(body: bytes, words: str) -> None:
    with pytest.raises(RequestInvalid, match=words) as caught:
        decode_object(body)
    assert caught.value.status == 400


@pytest.mark.parametrize("depth", [900, 1000, 1020, 1030])
def test_depth_near_the_limit_is_read_or_refused(depth: int) -> None:
    body = b'{"a":' + b"[" * depth + b"]" * depth + b"}"
    try:
        assert list(decode_object(body)) == ["a"]
    except RequestInvalid as err:
        assert "not valid JSON" in str(err)  # noqa: PT017 - which of both it is depends on the interpreter


def test_a_body_is_decoded() -> None:
    assert decode_object('\n{"a": [1, null, "ü"], "n": 18446744073709551616.5}'.encode()) == {
        "a": [1, None, "ü"],
        "n": 18446744073709551616.5,
    }


# --- what is accepted ------------------------------------------------------------------------------------------------


def test_nextflows_body_of_nulls_asks_for_a_plain_image() -> None:
    submission = parse_submission(NEXTFLOW, OpenHosts())
    check_rules(submission, legacy=False)
    check_supported(submission)
    assert submission.container_image == "ubuntu:latest"
    assert not submission.config


@pytest.mark.parametrize(
    "config",
    [None, {}, {"layers": []}, {"entrypoint": [], "cmd": [], "env": [], "workingDir": "", "layers": []}],
    ids=["null", "empty object", "empty layers", "empty members"],
)
def test_a_config_that_changes_nothing_is_none(config: object) -> None:
    assert not parse(containerConfig=config).config


def test_a_whole_config_is_read() -> None:
    given = a_layer(gzipSize="1234", location="https://registry.example/layer.tar.gz?sig=x", skipHashing=True)
    submission = parse(
        containerConfig={
            "entrypoint": ["/bin/sh", "-c"],
            "cmd": "id",
            "env": "A=1=2",
            "workingDir": "/work",
            "layers": given,
        }
    )
    wanted = Layer(given["location"], DIGEST, 1234, DIGEST)
    assert submission.config == ContainerConfig(("/bin/sh", "-c"), ("id",), ("A=1=2",), "/work", (wanted,))


def test_every_attribute_of_the_api_page_is_read() -> None:
    options = {"commands": ["id"], "basePackages": "p", "baseImage": "ubuntu:24.04"}
    submission = parse(
        containerFile="RlJPTSBhCg==",
        condaFile="YQ==",
        buildRepository="docker.io/user/my-image",
        cacheRepository="docker.io/user/my-cache",
        freeze=True,
        towerAccessToken="secret-1",
        towerRefreshToken="secret-2",
        towerWorkspaceId="123",
        workflowId="w",
        buildContext=a_layer(),
        packages={
            "type": "CONDA",
            "environment": "YQ==",
            "entries": ["salmon"],
            "channels": "conda-forge",
            "condaOpts": {"mambaImage": "m", **options},
            "pixiOpts": {"pixiImage": "p", **options},
            "cranOpts": {"rImage": "r", "commands": None, "basePackages": ""},
        },
        nameStrategy="tagPrefix",
        scanMode="required",
        scanLevels="LOW",
        buildCompression={"mode": "zstd", "level": "3", "force": True},
        buildTemplate="conda/pixi:v1",
        format="sif",
        unheardOf={"a": [1]},
    )
    assert submission.tower_workspace_id == 123
    assert submission.packages is not None
    assert submission.packages.channels == ["conda-forge"]
    assert submission.packages.cran_opts is not None
    assert submission.packages.cran_opts.base_packages is None
    assert submission.build_compression is not None
    assert submission.build_compression.level == 3
    assert "secret" not in repr(submission)


@pytest.mark.parametrize(
    "name",
    ["ubuntu", "quay.io:80/foo:latest", "localhost:8000/foo:latest", f"ubuntu@{DIGEST}", f"a.b/c:t@{DIGEST}", ""],
)
def test_image_names_that_are_accepted(name: str) -> None:
    assert parse(containerImage=name).container_image == (name or None)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        pytest.param({"containerImage": 1}, "containerImage: expected a string, got 1", id="number for text"),
        pytest.param({"containerImage": ["a"]}, "containerImage: expected a string, got an array", id="array for text"),
        pytest.param({"containerConfig": "a"}, 'containerConfig: expected an object, got "a"', id="text for object"),
        pytest.param(
            {"containerConfig": []}, "containerConfig: expected an object, got an array", id="array for object"
        ),
        pytest.param({"freeze": "yes"}, 'freeze: expected true or false, got "yes"', id="text for boolean"),
        pytest.param({"mirror": 0}, "mirror: expected true or false, got 0", id="number for boolean"),
        pytest.param({"dryRun": {}}, "dryRun: expected true or false, got an object", id="object for boolean"),
        pytest.param(
            {"containerConfig": {"cmd": ["a", 1]}},
            "containerConfig.cmd[1]: expected a string, got 1",
            id="number in texts",
        ),
        pytest.param({"containerConfig": {"cmd": ["a", None]}}, "containerConfig.cmd[1]: required", id="null in texts"),
        pytest.param(
            {"containerConfig": {"cmd": {"a": 1}}},
            "containerConfig.cmd[0]: expected a string, got an object",
            id="object for array",
        ),
        pytest.param(
            {"containerConfig": {"env": ["SECRET"]}}, "containerConfig.env[0]: expected NAME=value", id="no variable"
        ),
        pytest.param(
            {"containerConfig": {"env": ["=1"]}}, "containerConfig.env[0]: expected NAME=value", id="nameless variable"
        ),
        pytest.param(
            {"towerWorkspaceId": "12x"}, 'towerWorkspaceId: expected a whole number, got "12x"', id="text for number"
        ),
        pytest.param(
            {"towerWorkspaceId": True}, "towerWorkspaceId: expected a whole number, got true", id="boolean for number"
        ),
        pytest.param(
            {"towerWorkspaceId": 1.5}, "towerWorkspaceId: expected a whole number, got 1.5", id="fraction for number"
        ),
        pytest.param(
            {"nameStrategy": "TagPrefix"},
            "nameStrategy: expected 'none', 'tagPrefix' or 'imageSuffix', got \"TagPrefix\"",
            id="enum in other case",
        ),
        pytest.param(
            {"scanLevels": ["LOW", "low"]},
            "scanLevels[1]: expected 'LOW', 'MEDIUM', 'HIGH' or 'CRITICAL', got \"low\"",
            id="enum in an array",
        ),
        pytest.param(
            {"packages": {"type": "conda"}},
            "packages.type: expected 'CONDA' or 'CRAN', got \"conda\"",
            id="enum in an object",
        ),
        pytest.param(
            {"containerPlatform": "linux/foo"},
            "containerPlatform: Unsupported container platform: foo",
            id="unknown architecture",
        ),
        pytest.param(
            {"containerPlatform": " "}, "containerPlatform: Missing container platform attribute", id="blank platform"
        ),
        pytest.param(
            {"condaFile": "A" * 50_001},
            "condaFile: Conda file size exceeds the maximum allowed size of 50000 bytes",
            id="conda file",
        ),
        pytest.param(
            {"containerFile": "A" * 10_001},
            "containerFile: Container file size exceeds the maximum allowed size of 10000 bytes",
            id="container file",
        ),
        pytest.param(
            {"containerIncludes": ["a"] * 11},
            "containerIncludes: The number of container inclusions cannot be greater than 10",
            id="inclusions",
        ),
        pytest.param(
            {"containerIncludes": ["a", "A"]},
            "containerIncludes[1]: Invalid container image name — offending value: 'A'",
            id="included name",
        ),
        pytest.param(
            {"containerConfig": {"layers": [a_layer()] * (MAX_LAYERS + 1)}},
            f"containerConfig.layers: has {MAX_LAYERS + 1} items, and may have {MAX_LAYERS}",
            id="too many layers",
        ),
        pytest.param(
            {"containerConfig": {"cmd": ["a"] * (MAX_ITEMS + 1)}},
            f"containerConfig.cmd: has {MAX_ITEMS + 1} items, and may have {MAX_ITEMS}",
            id="too many texts",
        ),
        pytest.param(
            {"containerImage": "a" * (MAX_NAME_CHARS + 1)},
            f"containerImage: Invalid container image name — longer than {MAX_NAME_CHARS} characters",
            id="image name",
        ),
        pytest.param(
            {"cacheRepository": "a" * (MAX_NAME_CHARS + 1)},
            f"cacheRepository: Container build cache repository is longer than {MAX_NAME_CHARS} characters",
            id="repository",
        ),
        pytest.param(
            {"fingerprint": "é" * (MAX_TEXT_BYTES // 2) + "a"},
            f"fingerprint: has {MAX_TEXT_BYTES + 1} bytes, and may have {MAX_TEXT_BYTES}",
            id="text",
        ),
        pytest.param(
            {"containerConfig": {"env": ["A=1", "A=" + "a" * (MAX_ARGUMENT_BYTES - 1)]}},
            f"containerConfig.env[1]: has {MAX_ARGUMENT_BYTES + 1} bytes, and may have {MAX_ARGUMENT_BYTES}",
            id="variable",
        ),
    ],
)
def test_a_member_that_breaks_its_rule(attributes: dict[str, Any], message: str) -> None:
    assert refusal(**attributes) == message


@pytest.mark.parametrize(
    "key",
    [
        "towerAccessToken",
        "towerRefreshToken",
        "towerEndpoint",
        "containerPlatform",
        "timestamp",
        "fingerprint",
        "format",
        "workflowId",
        "buildTemplate",
    ],
)
def test_texts_have_a_limit(key: str) -> None:
    message = refusal(**{key: "x" * (MAX_TEXT_BYTES + 1)})
    assert message == f"{key}: has {MAX_TEXT_BYTES + 1} bytes, and may have {MAX_TEXT_BYTES}"


@pytest.mark.parametrize("key", ["entrypoint", "cmd", "env"])
def test_arguments_are_no_longer_than_linux_takes(key: str) -> None:
    most = "A=" + "a" * (MAX_ARGUMENT_BYTES - 2)
    assert parse(containerConfig={key: most}).config
    assert refusal(containerConfig={key: most + "a"}) == (
        f"containerConfig.{key}[0]: has {MAX_ARGUMENT_BYTES + 1} bytes, and may have {MAX_ARGUMENT_BYTES}"
    )


@pytest.mark.parametrize(
    ("key", "path"),
    [("entrypoint", "entrypoint[0]"), ("cmd", "cmd[0]"), ("env", "env[0]"), ("workingDir", "workingDir")],
)
def test_no_text_of_a_config_holds_nul(key: str, path: str) -> None:
    assert refusal(containerConfig={key: "A=a\0b"}) == f"containerConfig.{path}: must not contain the character NUL"


@pytest.mark.parametrize("scheme", ["data:", "gzip:", "https://a.example/", "docker://a.example/v2/a/blobs/"])
def test_no_location_holds_nul(scheme: str) -> None:
    assert refusal(**with_layer(location=f"{scheme}AA\0A")).startswith("containerConfig.layers[0].location: ")


@pytest.mark.parametrize("name", ["docker:quay.io/foo:latest", "ubuntu: latest", "ubuntu:latest ", "   "])
def test_image_names_that_are_refused(name: str) -> None:
    assert refusal(containerImage=name) == (f"containerImage: Invalid container image name — offending value: '{name}'")


@pytest.mark.parametrize("name", ["http://quay.io/foo:latest", "oras://quay.io/foo:latest", "docker://ubuntu"])
def test_image_names_with_a_scheme_are_refused(name: str) -> None:
    assert refusal(containerImage=name) == (
        f"containerImage: Invalid container repository name — offending value: '{name}'"
    )


def test_an_image_digest_must_be_whole() -> None:
    assert refusal(containerImage="ubuntu@sha256:1234").startswith("containerImage: 'sha256:1234' is not a digest")


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        ("foo.com", "is invalid or incomplete"),
        ("foo.com:5000", "is invalid or incomplete"),
        (" ", "is invalid or incomplete"),
        ("foo.com:x/a", "is invalid or incomplete"),
        ("http://foo.com", "should not include any protocol prefix"),
        ("s3://bucket/cache", "should not include any protocol prefix"),
        ("foo.com/ubuntu:latest", "should not include any tag suffix"),
        ("ubuntu:latest", "should not include any tag suffix"),
        (f"foo.com/ubuntu@{DIGEST}", "should not include any tag suffix"),
    ],
)
@pytest.mark.parametrize("key", ["buildRepository", "cacheRepository"])
def test_repositories_that_are_refused(key: str, value: str, rule: str) -> None:
    label = {"buildRepository": "Container build repository", "cacheRepository": "Container build cache repository"}
    assert refusal(**{key: value}) == f"{key}: {label[key]} {rule} - offending value: '{value}'"


@pytest.mark.parametrize("value", ["foo.com/ubuntu", "acme/foo", "foo", "localhost:5000/a/b"])
def test_repositories_that_are_accepted(value: str) -> None:
    submission = parse(buildRepository=value, cacheRepository=value)
    assert (submission.build_repository, submission.cache_repository) == (value, value)


def test_a_mirrors_target_may_be_a_registry_alone() -> None:
    for place in ("foo.com", "foo.com/", "localhost:5000", "foo.com/lib/"):
        assert parse(mirror=True, buildRepository=place).build_repository == place
    assert "protocol prefix" in refusal(mirror=True, buildRepository="http://foo.com")
    assert "tag suffix" in refusal(mirror=True, buildRepository="foo.com/a:b")


# --- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["location", "gzipDigest", "gzipSize", "tarDigest"])
@pytest.mark.parametrize("how", ["missing", "null"])
def test_layers_need_all_their_members(key: str, how: str) -> None:
    given = with_layer(**{key: None})
    if how == "missing":
        del given["containerConfig"]["layers"][0][key]
    assert refusal(**given) == f"containerConfig.layers[0].{key}: required"


@pytest.mark.parametrize("key", ["gzipDigest", "tarDigest"])
@pytest.mark.parametrize(
    "digest", ["", "sha256:", "sha256:xyz", HEX, f"sha256:{HEX[:-1]}", f"sha256:{HEX.upper()}", f"md5:{HEX[:32]}"]
)
def test_a_layers_digest_must_be_one(key: str, digest: str) -> None:
    assert refusal(**with_layer(**{key: digest})) == (
        f"containerConfig.layers[0].{key}: {digest!r} is not a digest: expected sha256:<64 lower-case hex digits>"
    )


def test_a_layers_digest_must_be_sha256() -> None:
    message = refusal(**with_layer(gzipDigest=f"sha512:{HEX * 2}"))
    assert message.startswith("containerConfig.layers[0].gzipDigest: 'sha512:")
    assert "is not a sha256 digest" in message


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "expected a number greater than 0, got 0"),
        (-1, "expected a number greater than 0, got -1"),
        ("-1", "expected a number greater than 0"),
        ("1_000", "expected a whole number"),
        ("", "expected a whole number"),
        (True, "expected a whole number"),
        ((1 << 50) + 1, "expected a number of at most 1125899906842624, got 1125899906842625"),
        ((1 << 64) - 1, "expected a number of at most 1125899906842624"),
    ],
)
def test_a_layers_size_must_be_one(size: object, words: str) -> None:
    message = refusal(**with_layer(gzipSize=size))
    assert message.startswith("containerConfig.layers[0].gzipSize: ")
    assert words in message


@pytest.mark.parametrize(
    "location", ["", "file:///etc/passwd", "ftp://a.example/x", "/etc/passwd", "DATA:AAAA", "x" * 99]
)
def test_a_layers_location_must_have_a_known_form(location: str) -> None:
    message = refusal(**with_layer(location=location))
    assert message.startswith("containerConfig.layers[0].location: unsupported location type")
    assert all(form in message for form in ("'data:", "'gzip:", "http://", "https://", "'docker://"))
    assert "x" * 30 not in message


def test_a_layers_location_may_be_long_but_not_too_long() -> None:
    rest = 14_000_000 - len("data:")
    assert parse(**with_layer(location="data:" + "A" * rest)).config.layers[0].is_inline
    assert refusal(**with_layer(location="data:" + "A" * (rest + 1))) == (
        "containerConfig.layers[0].location: Container layer exceeds the maximum allowed size"
    )


@pytest.mark.parametrize(
    "start", ["http://a.example/", "https://a.example/", f"docker://a.example/v2/a/blobs/{DIGEST}"]
)
def test_a_layers_address_is_shorter(start: str) -> None:
    if not start.startswith("docker"):
        assert parse(**with_layer(location=start.ljust(MAX_URL_CHARS, "a"))).config
    assert refusal(**with_layer(location=start.ljust(MAX_URL_CHARS + 1, "a"))) == (
        f"containerConfig.layers[0].location: an address may have {MAX_URL_CHARS} characters"
    )


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.0.0.1:8080",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "[::1]",
        "[::ffff:10.0.0.1]",
        "[fe80::1]",
        "[fd00:ec2::254]",
        "localhost",
        "LOCALHOST.",
        "a.localhost:5000",
    ],
)
def test_private_addresses_are_refused_at_once(host: str) -> None:
    with pytest.raises(RequestInvalid, match="private, loopback or link-local"):
        check_location(f"http://{host}/layer.tar.gz", OpenHosts())


@pytest.mark.parametrize(
    "location", ["http://8.8.8.8/x", "https://registry.example:5000/x?y=z", "http://[2606:4700::1]/"]
)
def test_public_addresses_are_left_to_the_connection(location: str) -> None:
    check_location(location, OpenHosts())


@pytest.mark.parametrize(
    "location", ["http://", "http:///x", "http://a b/", "http://a\t.b/", "http://[::1/", "http://a:b:c/"]
)
def test_urls_that_are_none(location: str) -> None:
    with pytest.raises(RequestInvalid, match="not a valid http"):
        check_location(location, OpenHosts())


def test_a_url_with_a_password_is_refused_and_not_repeated() -> None:
    message = refusal(**with_layer(location="https://me:hunter2@registry.example/x"))
    assert message == "containerConfig.layers[0].location: a layer's URL must not contain a user or password"


def test_addresses_that_the_configuration_opens() -> None:
    hosts = OpenHosts(frozenset({"127.0.0.1:5055"}), frozenset({"127.0.0.1:5055", "10.0.0.1:80"}))
    check_location("http://127.0.0.1:5055/x", hosts)
    check_location("http://10.0.0.1/x", hosts)
    check_location(f"docker://127.0.0.1:5055/v2/a/b/blobs/{DIGEST}", hosts)
    with pytest.raises(RequestInvalid, match="not allowed"):
        check_location("http://127.0.0.1:5056/x", hosts)
    with pytest.raises(RequestInvalid, match="not allowed"):
        check_location(f"docker://127.0.0.1:5056/v2/a/b/blobs/{DIGEST}", hosts)


@pytest.mark.parametrize(
    "location",
    [
        "docker://ubuntu",
        "docker://quay.io/v2/a/blobs/latest",
        "docker://quay.io/v2/a/blobs/sha256:12",
        f"docker://quay.io/v2/A/blobs/{DIGEST}",
        f"docker://quay.io/v2/../x/blobs/{DIGEST}",
        f"docker:///v2/a/blobs/{DIGEST}",
        f"docker://u:p@quay.io/v2/a/blobs/{DIGEST}",
    ],
)
def test_blob_locations_that_are_none(location: str) -> None:
    with pytest.raises(RequestInvalid):
        check_location(location, OpenHosts())


def test_a_blob_location_names_the_layers_own_digest() -> None:
    location = f"docker://quay.io/v2/a/b/c/blobs/{DIGEST}"
    assert parse(**with_layer(location=location)).config.layers[0].location == location
    other = DIGEST[:-1] + "0"
    message = refusal(**with_layer(location=location, gzipDigest=other))
    assert message.startswith("containerConfig.layers[0]: location names the blob")


# --- all at once -----------------------------------------------------------------------------------------------------


def test_every_wrong_member_is_named_at_once() -> None:
    message = refusal(
        containerImage="Ubuntu",
        containerPlatform="sparc",
        freeze=1,
        scanMode="maybe",
        containerConfig={
            "workingDir": 7,
            "layers": [a_layer(gzipDigest="sha256:1"), a_layer(gzipSize="many", location="ftp://x"), 5],
        },
    )
    paths = [
        "containerImage: ",
        "containerPlatform: ",
        "freeze: ",
        "scanMode: ",
        "containerConfig.workingDir: ",
        "containerConfig.layers[0].gzipDigest: ",
        "containerConfig.layers[1].gzipSize: ",
        "containerConfig.layers[1].location: ",
        "containerConfig.layers[2]: ",
    ]
    assert [path for path in paths if path not in message] == []


def test_a_message_does_not_grow_without_end() -> None:
    message = refusal(containerConfig={"cmd": [1] * 4000})
    assert message.count("containerConfig.cmd[") == MAX_REPORTED
    assert message.endswith(f"and {4000 - MAX_REPORTED} more")


def test_secrets_and_payloads_stay_out_of_messages() -> None:
    message = refusal(
        towerAccessToken=4711,
        towerRefreshToken=["secret-refresh"],
        containerFile=12345,
        containerConfig={"env": [8154]},
        buildContext="c2VjcmV0" * 1000,
    )
    assert all(secret not in message for secret in ("4711", "secret-refresh", "12345", "8154"))
    assert len(message) < 500


# --- rules over several members --------------------------------------------------------------------------------------

PACKAGES = {"type": "CONDA", "entries": ["salmon"]}
MIRROR = {"mirror": True, "containerImage": "quay.io/a/b:1", "towerAccessToken": "t", "buildRepository": "foo.com/x"}
CONFLICTS: list[tuple[str, bool, dict[str, Any], str]] = [
    ("nothing", False, {}, "Specify either 'containerImage' or 'containerFile' attribute"),
    ("nothing, legacy", True, {"containerImage": ""}, "Specify either 'containerImage' or 'containerFile' attribute"),
    (
        "image and file",
        False,
        {"containerImage": "a", "containerFile": "YQ=="},
        "Attributes 'containerImage' and 'containerFile' cannot be used in the same request",
    ),
    (
        "file and packages",
        False,
        {"containerFile": "YQ==", "packages": PACKAGES},
        "Attribute `containerFile` and `packages` conflicts each other",
    ),
    ("packages, legacy", True, {"containerImage": "a", "packages": PACKAGES}, "Attribute `packages` is not allowed"),
    (
        "name strategy, legacy",
        True,
        {"containerImage": "a", "nameStrategy": "none"},
        "Attribute `nameStrategy` is not allowed by legacy container endpoint",
    ),
    (
        "conda file and packages",
        False,
        {"condaFile": "YQ==", "packages": PACKAGES},
        "Attribute `condaFile` is deprecated - use `packages` instead",
    ),
    (
        "freeze a file",
        False,
        {"containerFile": "YQ==", "freeze": True},
        "Attribute `buildRepository` must be specified when using freeze mode [1]",
    ),
    (
        "freeze an image",
        False,
        {"containerImage": "a", "freeze": True},
        "Attribute `buildRepository` must be specified when using freeze mode [2]",
    ),
    (
        "freeze packages",
        False,
        {"packages": PACKAGES, "freeze": True},
        "Attribute `buildRepository` must be specified when using freeze mode [3]",
    ),
    (
        "sif without freeze",
        False,
        {"containerImage": "a", "format": "sif"},
        "Singularity build is only allowed enabling freeze mode - see 'wave.freeze' setting; "
        "Singularity images are not built by this version yet",
    ),
    (
        "several platforms of an image",
        False,
        {"containerImage": "a", "containerPlatform": "linux/amd64,linux/arm64"},
        "Multi-platform builds require either 'containerFile' or 'packages' attribute",
    ),
    (
        "other platforms",
        False,
        {"packages": PACKAGES, "containerPlatform": "linux/arm64,linux/amd64"},
        "Only linux/amd64,linux/arm64 multi-platform combination is currently supported",
    ),
    (
        "several platforms as sif",
        False,
        {
            "packages": PACKAGES,
            "containerPlatform": "amd64,arm64",
            "format": "sif",
            "freeze": True,
            "buildRepository": "a/b",
        },
        "Multi-platform builds are not supported for Singularity format; "
        "Singularity images are not built by this version yet",
    ),
    (
        "pixi for R",
        False,
        {"packages": {"type": "CRAN"}, "buildTemplate": "conda/pixi:v1"},
        "Package type 'CRAN' not supported by 'conda/pixi:v1' build template",
    ),
    (
        "no package type",
        False,
        {"packages": {"entries": ["a"]}},
        "Unexpected or missing package type '-' or build template '-'",
    ),
    (
        "unknown template",
        False,
        {"packages": PACKAGES, "buildTemplate": "x"},
        "Unexpected or missing package type 'CONDA' or build template 'x'",
    ),
    (
        "two lock files",
        False,
        {"packages": {"type": "CONDA", "entries": ["https://a/x", "https://a/y"]}},
        "No more than one Conda lock remote file can be specified at the same time",
    ),
    (
        "pip prefix",
        False,
        {"packages": {"type": "CONDA", "entries": ["pip::numpy"]}},
        "Invalid pip prefix - Likely you want to use 'pip:numpy' instead of 'pip::numpy'",
    ),
    ("mirror, legacy", True, MIRROR, "Container mirroring requires the use of v2 API"),
    (
        "mirror without image",
        False,
        {**MIRROR, "containerImage": None},
        "Attribute `containerImage` is required when specifying `mirror` mode",
    ),
    (
        "mirror and freeze",
        False,
        {**MIRROR, "freeze": True},
        "Attribute `mirror` and `freeze` conflict each other",
    ),
    (
        "mirror and file",
        False,
        {**MIRROR, "containerFile": "YQ=="},
        "Attribute `mirror` and `containerFile` conflict each other",
    ),
    (
        "mirror and inclusions",
        False,
        {**MIRROR, "containerIncludes": ["a"]},
        "Attribute `mirror` and `containerIncludes` conflict each other",
    ),
    (
        "mirror and config",
        False,
        {**MIRROR, "containerConfig": {"cmd": "a"}},
        "Attribute `mirror` and `containerConfig` conflict each other",
    ),
    (
        "mirror to nowhere",
        False,
        {**MIRROR, "buildRepository": None},
        "Attribute `buildRepository` is required when specifying `mirror` mode",
    ),
    (
        "mirror to itself",
        False,
        {**MIRROR, "buildRepository": "quay.io"},
        "Source and target mirror registry are the same - offending value 'quay.io'",
    ),
]


@pytest.mark.parametrize(
    ("legacy", "attributes", "message"), [case[1:] for case in CONFLICTS], ids=[case[0] for case in CONFLICTS]
)
def test_conflicts(legacy: bool, attributes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestInvalid) as caught:
        check_rules(parse(**attributes), legacy=legacy)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "identity",
    [
        pytest.param(Identity(7, "ada@site.test"), id="of the operator's own"),
        pytest.param(Identity(access_token="t"), id="of a Platform"),
    ],
)
def test_who_is_known_may_mirror(identity: Identity) -> None:
    check_known(parse(**MIRROR), identity)
    with pytest.raises(RequestInvalid, match="Container mirroring requires an authenticated request - specify the "):
        check_known(parse(**MIRROR), Identity(endpoint="https://api.cloud.seqera.io"))
    check_known(parse(containerImage="a"), Identity())


def test_all_conflicts_are_named_at_once() -> None:
    with pytest.raises(RequestInvalid) as caught:
        check_rules(parse(mirror=True, freeze=True, containerConfig={"cmd": "a"}), legacy=False)
    assert str(caught.value).count("; ") == 3


@pytest.mark.parametrize(
    ("attributes", "key"),
    [
        pytest.param({"containerImage": "a", "scanMode": "async"}, "scan", id="scan"),
        pytest.param({"containerFile": "YQ==", "scanMode": "required"}, "scan", id="scan of a build"),
    ],
)
def test_what_is_not_built_in_yet(attributes: dict[str, Any], key: str) -> None:
    submission = parse(**attributes)
    check_rules(submission, legacy=False)
    with pytest.raises(NotImplementedHere) as caught:
        check_supported(submission)
    assert caught.value.status == 501
    documented = (
        f" is not enabled - Check Wave configuration setting 'wave.{key}.enabled' - HTTP status=501 - response=-"
    )
    assert str(caught.value).endswith(f"{documented} - here: [scan] program")


@pytest.mark.parametrize(
    ("attributes", "is_built"),
    [
        pytest.param({"containerFile": "YQ=="}, True, id="file"),
        pytest.param({"packages": PACKAGES}, True, id="packages"),
        pytest.param({"packages": {"type": "CRAN"}, "containerImage": "a"}, True, id="packages on an image"),
        pytest.param({"condaFile": "YQ=="}, True, id="conda file"),
        pytest.param({"containerImage": "a", "freeze": True, "buildRepository": "a/b"}, True, id="freeze"),
        pytest.param({"containerImage": "a", "buildContext": a_layer()}, False, id="context"),
        pytest.param({"containerImage": "a", "nameStrategy": "none"}, False, id="name strategy"),
    ],
)
def test_what_takes_a_build(attributes: dict[str, Any], is_built: bool) -> None:
    submission = parse(**attributes)
    check_rules(submission, legacy=False)
    check_supported(submission)
    assert wants_build(submission) is is_built


def test_settings_for_builds_do_not_make_a_plain_image_one() -> None:
    submission = parse(
        containerImage="ubuntu",
        buildRepository="a/b",
        cacheRepository="a/c",
        buildCompression={"mode": "gzip"},
        buildTemplate="conda/micromamba:v2",
        scanMode="none",
        format="docker",
    )
    check_rules(submission, legacy=False)
    check_supported(submission)
    assert submission.build_repository == "a/b"
    assert not wants_build(submission)


# --- forms of answers ------------------------------------------------------------------------------------------------


def test_empty_members_are_left_out() -> None:
    document: dict[str, Any] = {"a": None, "b": "", "c": [], "d": (), "e": False, "f": 0, "g": {}, "h": "x"}
    assert filled(document) == {"e": False, "f": 0, "g": {}, "h": "x"}


@pytest.mark.parametrize(
    ("time", "text"),
    [(0.0, "1970-01-01T00:00:00Z"), (1712697541.715321, "2024-04-09T21:19:01.715321Z")],
)
def test_instants(time: float, text: str) -> None:
    assert format_instant(time) == text


@pytest.mark.parametrize(
    ("duration_s", "text"),
    [(0, b"0.000000000"), (1e-5, b"0.000010000"), (123.914989, b"123.914989000"), (-1, b"0.000000000")],
)
def test_durations_are_fixed_point_numbers(duration_s: float, text: bytes) -> None:
    written = orjson.dumps(format_seconds(duration_s))
    assert written == text
    assert math.isclose(orjson.loads(written), max(duration_s, 0))


@pytest.mark.parametrize(
    ("text", "is_time"),
    [
        ("2026-11-23T21:21:13.494450026Z", True),
        ("2024-04-09T20:31:35+02:00", True),
        ("2024-04-09T20:31:35", False),
        ("yesterday", False),
        ("", False),
    ],
)
def test_timestamps_have_an_offset(text: str, is_time: bool) -> None:
    assert (parse_timestamp(text) is not None) is is_time


def test_the_test_kits_inline_layer_is_accepted() -> None:
    given = layer({"hello": "world"})
    parsed = parse(containerConfig={"layers": [given.inline()]}).config.layers[0]
    assert (parsed.gzip_digest, parsed.gzip_size, parsed.tar_digest) == (given.digest, given.size, given.diff_id)


@pytest.mark.parametrize(
    ("path", "version"),
    [
        ("releases/v2.1.3-amd64.json", "2.1.3"),
        ("releases/v2.1.3-rc-amd64.json", "2.1.3-rc"),
        ("releases/pkg/2/2/8/fusion-amd64.tar.gz", "2.2.8"),
        ("pkg/pkg/2/fusion-arm64.tar.gz", "2"),
        ("releases/2.1.3-amd64.json", None),
        ("pkg/fusion-amd64.tar.gz", None),
        ("pkg/fusion-" * 8000, None),
        ("/v1-a.json" * 8000 + "x", None),
    ],
)
def test_the_version_of_fusion(path: str, version: str | None) -> None:
    fusion = Layer(f"https://fusionfs.seqera.io/{path}", DIGEST, 1, DIGEST)
    record = TokenRecord("0" * 32, ContainerRequest("a", ContainerConfig(layers=(fusion,))), "", "", False)
    assert described(record, None, "a").get("fusionVersion") == version


@pytest.mark.parametrize(
    ("level", "words"),
    [(-7, "a number of at least 0, got -7"), (23, "a number of at most 22, got 23"), ("99999", "at most 22")],
)
def test_levels_of_compression(level: object, words: str) -> None:
    assert refusal(buildCompression={"level": level}).startswith("buildCompression.level: expected ")
    assert words in refusal(buildCompression={"level": level})

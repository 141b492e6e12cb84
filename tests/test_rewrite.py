"""Settings and layers put into images: ``wave.md`` §3.2 to §3.4 and V44, as changed by ``decisions.md`` 10 and 22."""

import json
from dataclasses import replace
from typing import Any

import pytest

from bench import images
from bench.images import Family
from wave_proxy.errors import UpstreamError
from wave_proxy.image.oci import (
    DOCKER_LAYER,
    DOCKER_MANIFEST,
    OCI_CONFIG,
    OCI_LAYER,
    OCI_MANIFEST,
    Descriptor,
    digest_of,
    read_manifest,
)
from wave_proxy.image.request import ContainerConfig, Layer
from wave_proxy.image.rewrite import (
    architecture_of,
    layers_for,
    merge_env,
    rewrite_config,
    rewrite_index,
    rewrite_manifest,
)

ONE = Layer("data:", "sha256:" + "11" * 32, 100, "sha256:" + "aa" * 32)
TWO = Layer("data:", "sha256:" + "22" * 32, 200, "sha256:" + "bb" * 32)


def config_of(settings: Any = None, **members: Any) -> bytes:
    """An image config with one layer and these settings."""
    document = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": ["sha256:00"]}}
    return json.dumps(document | {"config": settings or {}} | members).encode()


def rewritten(config: bytes, layers: tuple[Layer, ...] = (), **changes: Any) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(rewrite_config(config, ContainerConfig(**changes), layers))
    return document


# --- the config's settings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "changes", "expected"),
    [
        pytest.param({}, {"cmd": ("a", "b")}, {"Cmd": ["a", "b"]}, id="cmd-added"),
        pytest.param({"Cmd": ["x"]}, {"cmd": ("a",)}, {"Cmd": ["a"]}, id="cmd-replaced"),
        pytest.param({"Cmd": None}, {"cmd": ("a",)}, {"Cmd": ["a"]}, id="cmd-was-null"),
        pytest.param({"WorkingDir": "/a"}, {"working_dir": "/b"}, {"WorkingDir": "/b"}, id="working-dir-replaced"),
        pytest.param({}, {"working_dir": "/ä b"}, {"WorkingDir": "/ä b"}, id="working-dir-added"),
        pytest.param({}, {"entrypoint": ("/e",)}, {"Entrypoint": ["/e"]}, id="entrypoint-added"),
        pytest.param(
            {"Cmd": ["x"]},
            {"entrypoint": ("/e",)},
            {"Cmd": ["x"], "Entrypoint": ["/e"]},
            id="cmd-stays-with-entrypoint",
        ),
        pytest.param({"User": "me", "Labels": {"a": "b"}}, {"cmd": ("c",)}, None, id="others-stay"),
        pytest.param({"Env": ["A=1"]}, {"cmd": ("c",)}, None, id="env-stays"),
        pytest.param({"Cmd": ["x"], "Env": ["A=1"], "WorkingDir": "/"}, {}, {}, id="nothing-changes"),
    ],
)
def test_settings(settings: dict[str, Any], changes: dict[str, Any], expected: dict[str, Any] | None) -> None:
    added = expected if expected is not None else {"Cmd": ["c"]}
    assert rewritten(config_of(settings), **changes)["config"] == settings | added


def test_no_change_leaves_every_byte() -> None:
    config = config_of({"Env": ["A=1"], "Cmd": ["x"]}, history=[{}])
    assert rewrite_config(config, ContainerConfig(), ()) == config


def test_facts_of_v44() -> None:
    config = config_of({"Env": ["PATH=/usr/bin"]}, history=[{"created_by": "a"}, {"created_by": "b"}])
    changes: dict[str, Any] = {"entrypoint": ("my", "entry"), "env": ("THIS=THAT",), "working_dir": "/some/work/dir"}
    found = rewritten(config, (ONE, TWO), **changes)
    assert found["config"] == {
        "Env": ["PATH=/usr/bin", "THIS=THAT"],
        "Entrypoint": ["my", "entry"],
        "WorkingDir": "/some/work/dir",
    }
    assert len(found["history"]) == 4
    assert found["history"][:2] == [{"created_by": "a"}, {"created_by": "b"}]


@pytest.mark.parametrize("config", [config_of(None, config=None), config_of()])
def test_missing_settings_are_made(config: bytes) -> None:
    assert rewritten(config, cmd=("a",), env=("A=1",))["config"] == {"Cmd": ["a"], "Env": ["A=1"]}


def test_missing_settings_object_is_made() -> None:
    config = json.dumps({"rootfs": {"diff_ids": []}}).encode()
    assert rewritten(config, entrypoint=("e",)) == {"rootfs": {"diff_ids": []}, "config": {"Entrypoint": ["e"]}}


# --- the environment ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (["A=1"], ["B=2"], ["A=1", "B=2"]),
        (["A=1", "B=2", "C=3"], ["B=9"], ["A=1", "B=9", "C=3"]),
        (["A=1"], ["A=2", "A=3"], ["A=3"]),
        ([], ["B=1", "A=2"], ["B=1", "A=2"]),
        (["A=1"], ["AA=2", "a=3"], ["A=1", "AA=2", "a=3"]),
        (["A=x=y"], ["A=p=q"], ["A=p=q"]),
        (["EMPTY="], ["EMPTY"], ["EMPTY"]),
        (["A=1"], [], ["A=1"]),
    ],
)
def test_env_is_merged_by_name(old: list[str], new: list[str], expected: list[str]) -> None:
    assert merge_env(old, new) == expected
    if new:
        assert rewritten(config_of({"Env": old}), env=tuple(new))["config"]["Env"] == expected


def test_env_that_is_null() -> None:
    assert rewritten(config_of({"Env": None}), env=("A=1",))["config"] == {"Env": ["A=1"]}


@pytest.mark.parametrize(
    ("entrypoint", "chain"),
    [
        ("/bin/run me", "/bin/run me"),
        (["/bin/run"], "/bin/run"),
        (["/bin/run", "-x", 'a "b"'], '["/bin/run","-x","a \\"b\\""]'),
        (["/bin/ä", "€"], '["/bin/ä","€"]'),
    ],
)
@pytest.mark.parametrize("replaced", [(), ("/new",)])
def test_entrypoint_is_handed_on(entrypoint: Any, chain: str, replaced: tuple[str, ...]) -> None:
    found = rewritten(config_of({"Entrypoint": entrypoint, "Env": ["A=1"]}), entrypoint=replaced, env=("B=2",))
    assert found["config"]["Env"] == ["A=1", "B=2", f"WAVE_ENTRY_CHAIN={chain}"]
    assert found["config"]["Entrypoint"] == (list(replaced) or entrypoint)


@pytest.mark.parametrize("settings", [{}, {"Entrypoint": None}, {"Entrypoint": []}, {"Entrypoint": ""}])
def test_no_entrypoint_no_chain(settings: dict[str, Any]) -> None:
    assert "Env" not in rewritten(config_of(settings), entrypoint=("/new",))["config"]


def test_chain_comes_with_layers_alone() -> None:
    assert rewritten(config_of({"Entrypoint": ["/e"]}), (ONE,))["config"]["Env"] == ["WAVE_ENTRY_CHAIN=/e"]


def test_chain_of_an_image_that_was_rewritten_before() -> None:
    once = rewrite_config(config_of({"Entrypoint": ["/first"]}), ContainerConfig(entrypoint=("/second",)), ())
    assert rewritten(once, entrypoint=("/third",))["config"]["Env"] == ["WAVE_ENTRY_CHAIN=/second"]


# --- layers in the config ----------------------------------------------------------------------------------------


def test_layers_follow_in_order() -> None:
    found = rewritten(config_of(), (TWO, ONE))
    assert found["rootfs"] == {"type": "layers", "diff_ids": ["sha256:00", TWO.tar_digest, ONE.tar_digest]}
    assert "history" not in found


def test_history_grows_with_diff_ids() -> None:
    history = [{"created_by": "base"}, {"created_by": "ENV", "empty_layer": True}]
    found = rewritten(config_of(history=history), (ONE, TWO))
    assert found["history"][:2] == history
    assert [entry["created_by"] for entry in found["history"][2:]] == [
        f"wave-proxy: layer {ONE.gzip_digest}",
        f"wave-proxy: layer {TWO.gzip_digest}",
    ]
    filled = [entry for entry in found["history"] if not entry.get("empty_layer")]
    assert len(filled) == len(found["rootfs"]["diff_ids"])


def test_history_does_not_grow_without_layers() -> None:
    history = [{"created_by": "base"}]
    assert rewritten(config_of(history=history), cmd=("x",))["history"] == history


@pytest.mark.parametrize("history", [None, []])
def test_history_that_is_not_kept(history: object) -> None:
    found = rewritten(config_of(history=history), (ONE,))["history"]
    assert (found is None) if history is None else (len(found) == 1)


def test_diff_ids_may_be_null() -> None:
    found = rewritten(config_of(rootfs={"type": "layers", "diff_ids": None}), (ONE,))
    assert found["rootfs"]["diff_ids"] == [ONE.tar_digest]


@pytest.mark.parametrize(
    "config",
    [
        b"",
        b"[]",
        b"{}",
        b'{"rootfs":[]}',
        b'{"rootfs":{},"config":"x"}',
        b'{"rootfs":{"diff_ids":{}}}',
        b'{"rootfs":{"diff_ids":"sha256:00"}}',
        b'{"rootfs":{},"config":{"Env":"A=1"}}',
        b'{"rootfs":{},"config":{"Env":{"A":1}}}',
        b'{"rootfs":{},"config":{"Env":[1]}}',
    ],
)
def test_config_that_is_none(config: bytes) -> None:
    with pytest.raises(UpstreamError, match="image config"):
        rewrite_config(config, ContainerConfig(env=("A=1",)), (ONE,))


def test_what_is_not_edited_stays_as_written() -> None:
    config = b'{ "os.x": 1.10, "big":12345678901234567890123, "n":"\\u00e9\\/" ,\n "config":{"Cmd":["a"]},"rootfs":{}}'
    assert rewrite_config(config, ContainerConfig(cmd=("b",)), ()) == config.replace(b'["a"]', b'["b"]')


# --- architectures -----------------------------------------------------------------------------------------------


def test_layers_for_one_architecture() -> None:
    amd64 = replace(ONE, location="https://fusionfs.seqera.io/releases/fusion-amd64.tar.gz")
    arm64 = replace(ONE, location="https://fusionfs.seqera.io/releases/fusion-arm64.tar.gz")
    named = replace(ONE, location="https://elsewhere/fusion-amd64.tar.gz?x")
    assert layers_for((TWO, amd64, arm64, named), "amd64") == (TWO, amd64, named)
    assert layers_for((TWO, amd64, arm64), "arm64") == (TWO, arm64)
    assert layers_for((amd64, arm64), "s390x") == ()


def test_architecture_of() -> None:
    assert architecture_of(config_of()) == "amd64"
    assert architecture_of(b"{}") == ""
    assert architecture_of(b'{"architecture":7}') == ""
    with pytest.raises(UpstreamError):
        architecture_of(b"no")


# --- manifests ---------------------------------------------------------------------------------------------------

NEW = Descriptor(OCI_CONFIG, "sha256:" + "cc" * 32, 4321)
BASE = images.layer({"base": "1"})


@pytest.mark.parametrize(("family", "layer_type"), [("oci", OCI_LAYER), ("docker", DOCKER_LAYER)])
def test_manifest_names_the_new_config_and_layers(family: Family, layer_type: str) -> None:
    base = images.image([BASE], family=family)
    found = rewrite_manifest(base.manifest, base.media_type, NEW, (ONE, TWO))
    manifest = read_manifest(found, base.media_type)
    assert manifest.config == Descriptor(base.blobs[0].media_type, NEW.digest, NEW.size)
    assert manifest.layers == (
        Descriptor(layer_type, BASE.digest, BASE.size),
        Descriptor(layer_type, ONE.gzip_digest, 100),
        Descriptor(layer_type, TWO.gzip_digest, 200),
    )
    assert list(json.loads(found)["layers"][-1]) == ["mediaType", "size", "digest"]


@pytest.mark.parametrize("media_type", [OCI_MANIFEST, DOCKER_MANIFEST])
def test_layer_of_another_image_keeps_its_type(media_type: str) -> None:
    zstd = "application/vnd.oci.image.layer.v1.tar+zstd"
    base = images.image([BASE], media_type_in_body=False)
    found = json.loads(rewrite_manifest(base.manifest, media_type, NEW, (replace(ONE, media_type=zstd),)))
    assert found["layers"][1]["mediaType"] == zstd


@pytest.mark.parametrize("layers", [{}, {"layers": None}, {"layers": []}])
def test_manifest_without_layers_gets_some(layers: dict[str, Any]) -> None:
    config = {"mediaType": OCI_CONFIG, "digest": "sha256:" + "00" * 32, "size": 1}
    content = json.dumps({"config": config, **layers}).encode()
    found = json.loads(rewrite_manifest(content, OCI_MANIFEST, NEW, (ONE,)))
    assert [layer["digest"] for layer in found["layers"]] == [ONE.gzip_digest]


def test_manifest_with_new_settings_only() -> None:
    base = images.image([BASE])
    found = rewrite_manifest(base.manifest, base.media_type, NEW, ())
    old = base.blobs[0]
    expected = base.manifest.replace(old.digest.encode(), NEW.digest.encode())
    assert found == expected.replace(b'"size":%d' % old.size, b'"size":4321', 1)


def test_annotations_and_unknown_members_stay() -> None:
    document = json.loads(images.image([BASE]).manifest) | {"annotations": {"a": "1.0"}, "x": [1.0, "é"]}
    content = json.dumps(document, indent=3, ensure_ascii=False).encode()
    found = json.loads(rewrite_manifest(content, OCI_MANIFEST, NEW, (ONE,)))
    assert (found["annotations"], found["x"]) == ({"a": "1.0"}, [1.0, "é"])


# --- indexes -----------------------------------------------------------------------------------------------------

CHILDREN = [images.image([BASE], platform=platform) for platform in ("linux/amd64", "linux/arm64", "linux/arm/v7")]


@pytest.mark.parametrize("family", ["oci", "docker"])
def test_index_changes_only_what_was_replaced(family: Family) -> None:
    index = images.index(CHILDREN, family=family)
    found = json.loads(rewrite_index(index.manifest, {0: Descriptor(OCI_MANIFEST, NEW.digest, 123)}))
    expected = json.loads(index.manifest)
    expected["manifests"][0] |= {"digest": NEW.digest, "size": 123}
    assert found == expected


def test_index_with_every_platform_replaced() -> None:
    index = images.index(CHILDREN)
    replaced = {n: Descriptor(OCI_MANIFEST, f"sha256:{n:064}", n) for n in range(3)}
    manifest = read_manifest(rewrite_index(index.manifest, replaced), index.media_type)
    assert [entry.descriptor for entry in manifest.entries] == list(replaced.values())
    assert [str(entry.platform) for entry in manifest.entries] == ["linux/amd64", "linux/arm64", "linux/arm/v7"]


def test_index_without_replacements_is_the_same() -> None:
    index = images.index(CHILDREN)
    assert rewrite_index(index.manifest, {}) == index.manifest


# --- the whole of it ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["oci", "docker"])
@pytest.mark.parametrize("history", [True, False])
def test_rewritten_image_is_consistent(family: Family, history: bool) -> None:
    base = images.image([BASE], family=family, entrypoint=["/e"], env=["A=1"], history=history)
    extra = images.layer({"extra": "2"})
    layers = (Layer(extra.inline()["location"], extra.digest, extra.size, extra.diff_id),)
    config = rewrite_config(base.blobs[0].content, ContainerConfig(cmd=("c",)), layers)
    descriptor = Descriptor(base.blobs[0].media_type, digest_of(config), len(config))
    manifest = read_manifest(rewrite_manifest(base.manifest, base.media_type, descriptor, layers), base.media_type)
    document = json.loads(config)
    assert manifest.is_image
    assert manifest.config == descriptor
    assert [layer.digest for layer in manifest.layers] == [BASE.digest, extra.digest]
    assert document["rootfs"]["diff_ids"] == [BASE.diff_id, extra.diff_id]
    assert len(document.get("history", [])) == (2 if history else 0)


def test_same_input_same_bytes_on_any_machine() -> None:
    config = b'{"config":{"Entrypoint":["/e"]},"rootfs":{"diff_ids":[]},"history":[]}'
    changes = ContainerConfig(entrypoint=("/n",), env=("B=1", "A=2"), working_dir="/w")
    assert rewrite_config(config, changes, (ONE,)) == (
        b'{"config":{"Entrypoint":["/n"],"WorkingDir":"/w","Env":["B=1","A=2","WAVE_ENTRY_CHAIN=/e"]},'
        b'"rootfs":{"diff_ids":["sha256:' + b"aa" * 32 + b'"]},'
        b'"history":[{"created":"1970-01-01T00:00:00Z","created_by":"wave-proxy: layer sha256:' + b"11" * 32 + b'"}]}'
    )

"""Mirrors by the whole program: an image of another registry copied to a third one, asked for by its users."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from bench.images import Family, Image, blob, descriptor, digest_of, image, index, layer
from bench.upstream import Upstream
from tests.identified import issue
from tests.mirroring.scene import ADMIN, CONFIG, Scene, open_local_scene, open_scene
from tests.patience import until
from tests.servers import WaveProxy, distribution, has_distribution, http_request, pull, redis_server
from wave_proxy.image.oci import OCI_CONFIG, OCI_INDEX, OCI_MANIFEST


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    if not has_distribution():
        pytest.skip("docker-registry is not installed (Debian package docker-registry)")
    with open_scene(tmp_path_factory.mktemp("mirror")) as opened:
        yield opened


def two_platforms(name: str, family: Family = "oci") -> Image:
    """An index of two images that share a layer."""
    shared = layer({"shared": name})
    images = [
        image([shared, layer({"own": f"{name} {platform}"})], platform=platform, family=family)
        for platform in ("linux/amd64", "linux/arm64")
    ]
    return index(images, family=family)


@pytest.mark.parametrize("family", ["oci", "docker"])
def test_an_index_is_copied_with_all_its_platforms(scene: Scene, family: Family) -> None:
    made = two_platforms(family, family)
    scene.source.add(f"{family}/tool", made, "1.0")
    found = scene.mirrored(f"{family}/tool:1.0")
    assert found["digest"] == made.digest
    assert found["targetImage"] == f"{scene.place}/{family}/tool:1.0"
    there = scene.pull(f"{family}/tool", "1.0")
    assert (there.digest, there.manifest, there.media_type) == (made.digest, made.manifest, made.media_type)
    assert [child.manifest for child in there.children] == [child.manifest for child in made.children]
    sent = scene.sent(f"{family}/tool")
    sizes = {blob.digest: [blob.size] for child in made.children for blob in child.blobs}
    assert sent == sizes, "each blob once"


def test_what_the_index_names_besides_images_is_copied_too(scene: Scene) -> None:
    inner = two_platforms("inner")
    made = index_of([two_platforms("outer").children[0], inner, attestation()])
    scene.source.add("lib/everything", made, "1.0")
    found = scene.mirrored("lib/everything:1.0")
    assert found["digest"] == made.digest
    for child in (*made.children, *inner.children):
        path = f"/v2/{scene.prefix}lib/everything/manifests/{child.digest}"
        answer = http_request(scene.target.behind, "GET", path, headers={"Accept": child.media_type})
        assert (answer.status, answer.body) == (200, child.manifest)
    assert f">> an index of 3 manifests, {made.digest}; " in found["logs"]


def attestation() -> Image:
    """A manifest with a statement about an image, as BuildKit puts it beside that."""
    config, statement = blob(b"{}", OCI_CONFIG), blob(b"statement", "application/vnd.in-toto+json")
    document = {"schemaVersion": 2, "config": descriptor(config), "layers": [descriptor(statement)]}
    manifest = json.dumps({**document, "mediaType": OCI_MANIFEST}).encode()
    return Image(digest_of(manifest), OCI_MANIFEST, manifest, (config, statement))


def index_of(manifests: list[Image]) -> Image:
    """An index of anything."""
    entries = [{"mediaType": one.media_type, "digest": one.digest, "size": len(one.manifest)} for one in manifests]
    content = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}).encode()
    return Image(digest_of(content), OCI_INDEX, content, (), tuple(manifests))


def test_an_image_named_by_its_digest(scene: Scene) -> None:
    made = two_platforms("by digest")
    scene.source.add("lib/digest", made)
    found = scene.mirrored(f"lib/digest@{made.digest}")
    assert found["targetImage"] == f"{scene.place}/lib/digest@{made.digest}"
    assert scene.pull("lib/digest", made.digest).manifest == made.manifest


def test_the_token_of_a_mirror_is_not_pulled(scene: Scene) -> None:
    scene.source.add("lib/direct", image([layer({"a": "direct"})]), "1.0")
    answer = scene.submit("lib/direct:1.0")
    scene.ended(answer)
    path = f"/v2/wt/{answer['requestId']}/{scene.prefix}lib/direct/manifests/1.0"
    found = scene.wave.request("GET", path)
    assert found.status == 404
    assert f"{scene.place}/lib/direct:1.0" in found.json()["errors"][0]["message"]


def test_only_what_the_target_lacks_is_sent(scene: Scene) -> None:
    old, new = (image([layer({"base": "shared"}), layer({"own": name})]) for name in ("old", "new"))
    scene.source.add("lib/moving", old, "latest")
    scene.mirrored("lib/moving:latest")
    scene.source.add("lib/moving", new, "latest")
    found = scene.mirrored("lib/moving:latest")
    assert found["digest"] == new.digest
    assert found["mirrorId"].endswith("_2")
    sent = scene.sent("lib/moving")
    assert sent == {one.digest: [one.size] for one in (*old.blobs, *new.blobs)}
    assert "sent 2 of 2 blobs" in found["logs"]
    assert "; 1 did not have to be" in found["logs"]


def test_one_that_is_cancelled(scene: Scene) -> None:
    scene.source.add("lib/unwanted", image([layer({"a": "unwanted"})]), "1.0")
    held = scene.target.hold("blob", f"{scene.prefix}lib/unwanted")
    answer = scene.submit("lib/unwanted:1.0")
    path = f"/v1alpha1/mirrors/{answer['buildId']}"
    until(held.reached.is_set, lambda: scene.log(answer["buildId"]))
    assert scene.wave.request("DELETE", path, headers=ADMIN).status == 202
    assert scene.ended(answer)["reason"] == "cancelled"
    held.release.set()
    assert scene.wave.request("DELETE", path, headers=ADMIN).status == 409


HTPASSWD = "user:$2y$04$cSIOXkV5cVUjymeJJ4gY0O4Okw1h57wlg4Vz6NQXjVMUvutr8t.vu\n"  # of "secret"
LOGIN = 'insecure = true\nallow_private = true\nusername = "user"\npassword = "secret"\nusers = ["ada@site.test"]\n'


def test_private_source_and_target(tmp_path: Path) -> None:
    """Whose logins are one user's."""
    made = two_platforms("private")
    with ExitStack() as stack:
        redis = stack.enter_context(redis_server(tmp_path))
        source = stack.enter_context(Upstream(auth="bearer"))
        source.add("team/tool", made, "1.0")
        registry = stack.enter_context(distribution(tmp_path, htpasswd=HTPASSWD))
        config = CONFIG + "".join(f'[registries."{host}"]\n{LOGIN}' for host in (source.address, registry))
        wave = stack.enter_context(WaveProxy(tmp_path / "wave", config=config, redis=redis))
        ada, eve = issue(redis, "ada@site.test"), issue(redis, "eve@site.test")
        body = {"containerImage": f"{source.address}/team/tool:1.0", "buildRepository": registry, "mirror": True}
        refused = wave.request("POST", "/v1alpha2/container", body={**body, "towerAccessToken": eve})
        assert refused.status == 400
        assert "access is not authorized" in refused.json()["message"]
        shown = {**body, "towerAccessToken": ada, "buildRepository": f"localhost:{wave.port}/local/mirror"}
        refused = wave.request("POST", "/v1alpha2/container", body=shown)
        assert refused.status == 400
        assert "the image is private, and a copy of it on this server begins with" in refused.json()["message"]
        answer = wave.submit(**{**body, "towerAccessToken": ada})
        path = f"/v1alpha1/mirrors/{answer['buildId']}"
        until(lambda: wave.request("GET", path).json()["status"] == "COMPLETED", lambda: wave.stderr)
        found = wave.request("GET", path).json()
        assert found["exitCode"] == 0, found["logs"]
        assert found["digest"] == made.digest
        login = {"Authorization": "Basic dXNlcjpzZWNyZXQ="}
        assert pull(registry, "team/tool", "1.0", headers=login).digest == made.digest


def test_a_local_repository_gets_no_blob_that_another_one_has(tmp_path: Path) -> None:
    with open_local_scene(tmp_path) as scene:
        base = layer({"base": "1"})
        for name in ("first", "second"):
            made = image([base, layer({"own": name})])
            scene.source.add(f"lib/{name}", made, "1")
            assert scene.mirrored(f"lib/{name}:1")["digest"] == made.digest
            assert scene.pull(f"lib/{name}", "1").digest == made.digest
        assert base.digest in scene.sent("lib/first")
        assert base.digest not in scene.sent("lib/second")

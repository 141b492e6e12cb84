"""A build of a private image, from the request to the pull: by who may, and by others."""

import gzip
from base64 import b64encode
from collections.abc import Callable
from typing import Any

import pytest

from bench.images import image, layer
from bench.upstream import Upstream
from tests.building.works import why_no_builds
from tests.identified import issue
from tests.servers import WaveProxy

pytestmark = pytest.mark.skipif(bool(why_no_builds()), reason=why_no_builds())

USER, PASSWORD = "user", "secret"
SECRET = layer({"secret.txt": "the eagle flies at midnight"})
BASE = image([SECRET], env=("PATH=/bin",))


def test_a_private_build(upstream: Callable[..., Upstream], wave: Callable[..., WaveProxy], redis_url: str) -> None:
    vault = upstream(auth="bearer", username=USER, password=PASSWORD)
    vault.add("acme/base", BASE, "1")
    config = f'[registries."{vault.address}"]\ninsecure = true\nallow_private = true\n'
    config += f'username = "{USER}"\npassword = "{PASSWORD}"\nusers = ["*@acme.org"]\n'
    proxy = wave(config=config, redis=redis_url)
    file = b64encode(f"FROM {vault.address}/acme/base:1\nENV BUILT=yes\n".encode()).decode()

    def asked(user: str) -> dict[str, Any]:
        return {"containerFile": file, **({"towerAccessToken": issue(redis_url, user)} if user else {})}

    answer = proxy.submit(**asked("alice@acme.org"))
    pulled = proxy.pull(answer["targetImage"])  # held until it is built
    assert b"the eagle flies" in gzip.decompress(pulled.layers[0])
    assert "BUILT=yes" in pulled.config["config"]["Env"]
    assert proxy.submit(**asked("alice@acme.org"))["cached"] is True
    for user in ("mallory@else.org", ""):
        refused = proxy.request("POST", "/v1alpha2/container", body=asked(user))
        assert (refused.status, "access is not authorized" in refused.json()["message"]) == (400, True)
    _, _, name = answer["containerImage"].partition("/")
    assert name.startswith("local/private/")
    repository, _, tag = name.partition(":")
    for path in (
        f"manifests/{tag}",
        f"manifests/{pulled.digest}",
        f"blobs/{pulled.document['layers'][0]['digest']}",
        "tags/list",
    ):
        assert proxy.request("GET", f"/v2/{repository}/{path}").status == 401
    for user in ("mallory@else.org", ""):  # nor by asking for it as an image that is there
        body = {**asked(user), "containerImage": answer["containerImage"]}
        del body["containerFile"]
        assert proxy.request("POST", "/v1alpha2/container", body=body).status == 400
    again = {"containerImage": answer["containerImage"], "towerAccessToken": issue(redis_url, "alice@acme.org")}
    assert proxy.pull(proxy.submit(**again)["targetImage"]).digest == pulled.digest


def test_a_build_of_a_private_image_named_as_everybody_pulls_it(
    upstream: Callable[..., Upstream], wave: Callable[..., WaveProxy], redis_url: str
) -> None:
    vault = upstream(auth="bearer", username=USER, password=PASSWORD)
    vault.add("acme/base", BASE, "1")
    config = f'[registries."vault.test"]\nendpoint = "http://{vault.address}"\n'
    config += f'username = "{USER}"\npassword = "{PASSWORD}"\nusers = ["*@acme.org"]\n'
    proxy = wave(config=config, redis=redis_url)
    alice, name = issue(redis_url, "alice@acme.org"), "vault.test/acme/base:1"
    proxy.pull(proxy.submit(containerImage=name, towerAccessToken=alice)["targetImage"])
    through = f"localhost:{proxy.address.rpartition(':')[2]}/{name}"
    refused = proxy.request("POST", "/v1alpha2/container", body={"containerImage": through, "towerAccessToken": alice})
    assert refused.status == 400, refused.body
    file = b64encode(f"FROM {through}\nENV BUILT=yes\n".encode()).decode()
    answer = proxy.submit(containerFile=file, towerAccessToken=alice)
    repository, _, tag = answer["targetImage"].partition("/")[2].rpartition(":")
    held = proxy.request("GET", f"/v2/{repository}/manifests/{tag}")
    assert held.status == 404
    assert "base image not found or not readable" in held.json()["errors"][0]["message"]

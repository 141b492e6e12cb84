"""The whole program offline: nothing is asked but itself."""

from base64 import b64encode
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.images import image, layer
from bench.upstream import Upstream
from tests.building.works import why_no_builds
from tests.servers import WaveProxy, push

TOOL = image([layer({"bin/tool": "1"})], env=["PATH=/bin"])
LOCAL = image([layer({"bin/local": "1"})])
HOST = "tools.test"
OFFLINE = "[upstream]\noffline = true\n[local]\nanonymous_push = true\n"


def offline_with_tool(upstream: Upstream, wave: Callable[..., WaveProxy], tmp_path: Path) -> WaveProxy:
    """The program offline, with what it pulled before: the image ``tool:1`` of that registry, which is called HOST."""
    upstream.add("tool", TOOL, "1")
    data, table = tmp_path / "data", f'[registries."{HOST}"]\nendpoint = "http://{upstream.address}"\n'
    with WaveProxy(data, config=table) as online:
        online.pull(f"{online.address}/{HOST}/tool:1")
    upstream.clear_log()
    return wave(data=data, config=table + OFFLINE)


def test_stored_and_own_images_are_requested_and_shown(
    upstream: Callable[..., Upstream], wave: Callable[..., WaveProxy], tmp_path: Path
) -> None:
    server = upstream()
    proxy = offline_with_tool(server, wave, tmp_path)
    assert proxy.pull(proxy.submit(containerImage=f"{HOST}/tool:1")["targetImage"]).digest == TOOL.digest
    refused = proxy.request("POST", "/v1alpha2/container", body={"containerImage": f"{HOST}/other:1"})
    assert (refused.status, refused.headers["Retry-After"]) == (503, None)
    assert refused.json()["message"].startswith(f"Registry '{HOST}' is not available: this proxy is offline")
    push(proxy.address, "local/mine", LOCAL, "1")
    own = f"localhost:{proxy.address.rpartition(':')[2]}"
    mine = f"{own}/local/mine:1"
    assert proxy.pull(proxy.submit(containerImage=mine)["targetImage"]).digest == LOCAL.digest
    through = f"{own}/{HOST}/tool:1"
    assert proxy.pull(proxy.submit(containerImage=through)["targetImage"]).digest == TOOL.digest
    for name, digest in ((mine, LOCAL.digest), (through, TOOL.digest)):
        shown = proxy.request("POST", "/v1alpha1/inspect", body={"containerImage": name})
        assert (shown.status, shown.json()["container"]["digest"]) == (200, digest), shown.body
    assert server.log == []


@pytest.mark.skipif(bool(why_no_builds()), reason=why_no_builds())
def test_a_build_of_what_is_stored(
    upstream: Callable[..., Upstream], wave: Callable[..., WaveProxy], tmp_path: Path
) -> None:
    server = upstream()
    proxy = offline_with_tool(server, wave, tmp_path)
    through = f"localhost:{proxy.address.rpartition(':')[2]}/{HOST}/tool:1"
    lines = (f"FROM {HOST}/tool:1 AS one", f"FROM {through}", "COPY --from=one /bin/tool /again", "ENV BUILT=yes", "")
    file = b64encode("\n".join(lines).encode()).decode()
    pulled = proxy.pull(proxy.submit(containerFile=file)["targetImage"])  # held until it is built
    assert "BUILT=yes" in pulled.config["config"]["Env"]
    assert server.log == []

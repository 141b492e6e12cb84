"""Base images that are not for the platform, or not there, with the whole program and buildah."""

from collections.abc import Iterator

import pytest

from bench.images import image, layer
from bench.upstream import Upstream
from tests.building.works import Works, log_of, open_works, order, wait_done, why_no_builds
from tests.servers import WaveProxy

AMD, ARM = "linux/amd64", "linux/arm64"


@pytest.fixture(scope="module")
def works(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Works]:
    if reason := why_no_builds():
        pytest.skip(reason)
    with open_works(tmp_path_factory.mktemp("bases")) as opened:
        yield opened


@pytest.fixture(scope="module")
def source() -> Iterator[Upstream]:
    """A registry with images of one platform each."""
    with Upstream() as upstream:
        for name, platform in (("amd", AMD), ("arm", ARM)):
            upstream.add(f"lib/{name}", image([layer({"file": name})], platform=platform), "1")
        yield upstream


@pytest.fixture(scope="module")
def wave(works: Works, source: Upstream) -> Iterator[WaveProxy]:
    with works.wave(upstreams=(source.address,)) as started:
        yield started


@pytest.mark.parametrize(
    "text",
    [
        "FROM {0}/lib/arm:1\n",
        "FROM --platform=$TARGETPLATFORM {0}/lib/arm:1\n",
        "FROM --platform=$BUILDPLATFORM {0}/lib/amd:1 AS made\nFROM {0}/lib/arm:1\nCOPY --from=made /file /made\n",
        "FROM --platform=linux/amd64 {0}/lib/amd:1 AS made\nFROM scratch\nCOPY --from=made /file /made\n",
        "FROM {0}/lib/amd:1 AS data\nFROM {0}/lib/arm:1\nCOPY --from=data /file /data\n",
    ],
)
def test_a_build_for_another_platform(wave: WaveProxy, source: Upstream, text: str) -> None:
    answer = order(wave, text.format(source.address), containerPlatform=ARM)
    assert wait_done(wave, answer["buildId"])["succeeded"], log_of(wave, answer["buildId"])


@pytest.mark.parametrize(
    "text",
    ["FROM {0}/lib/amd:1\nLABEL a=b\n", "FROM {0}/lib/amd:1 AS made\nFROM made\n"],
    ids=["at once", "by a stage"],
)
def test_a_base_image_of_another_platform_fails_the_build(wave: WaveProxy, source: Upstream, text: str) -> None:
    build_id = order(wave, text.format(source.address), containerPlatform=ARM)["buildId"]
    status = wait_done(wave, build_id)
    assert not status["succeeded"]
    said = f"({source.address}/lib/amd:1 is for linux/amd64, and not for linux/arm64)"
    assert status["reason"].startswith("missing platform: a base image does not exist for the platform")
    assert said in status["reason"]


def test_why_a_registry_gives_nothing(wave: WaveProxy, source: Upstream) -> None:
    source.faults.status["/lib/gone/"] = 503
    status = wait_done(wave, order(wave, f"FROM {source.address}/lib/gone:1\n")["buildId"])
    assert status["reason"].startswith("base image can't be read: ")
    assert f"{source.address} fails to give {source.address}/lib/gone:1 (HTTP 503)" in status["reason"]
    assert "wt/" not in status["reason"]


def test_the_names_that_base_images_are_read_by_are_shown_to_nobody(works: Works, wave: WaveProxy) -> None:
    """As tools write them into messages; buildah 1.28 lets a step see its files, and so write the same."""
    show = """sed -n 's|.*"[^/]*\\(/wt/[^"]*\\)".*|Get "http://x/v2\\1/blobs/y"|p' /c/buildah/registries.conf"""
    text = f"FROM {works.base}\nRUN --mount=type=cache,id=../../../build,target=/c {show}; echo looked\n"
    build_id = order(wave, text)["buildId"]
    wait_done(wave, build_id)
    log = log_of(wave, build_id).partition("STEP 2/2")[2].partition("\n")[2]
    assert "looked\n" in log
    assert "/wt/" not in log

"""What a builder sees of base images before it builds."""

import pytest

from bench.images import Image, image, index, layer
from bench.upstream import Upstream
from builder.bases import Bases
from builder.failures import BuildFailed
from tests.outgoing import registry_at
from wave_proxy.image.oci import parse_platform
from wave_proxy.image.reference import parse_reference

FILES = layer({"a": "b"})
AMD, ARM, ARM_V7 = (image([FILES], platform=name) for name in ("linux/amd64", "linux/arm64", "linux/arm/v7"))
NAME = "docker.io/lib/base:1"


@pytest.mark.parametrize(
    ("made", "wanted", "is_right"),
    [
        pytest.param(AMD, "linux/amd64", True, id="same"),
        pytest.param(AMD, "linux/arm64", False, id="other"),
        pytest.param(ARM_V7, "linux/arm/v7", True, id="same variant"),
        pytest.param(ARM_V7, "linux/arm/v6", False, id="other variant"),
        pytest.param(image([FILES], family="docker"), "linux/arm64", False, id="of docker's kind"),
        pytest.param(image([FILES], platform="/"), "linux/arm64", True, id="says nothing"),
        pytest.param(index([AMD, ARM]), "linux/arm/v7", True, id="index, which the tools look at"),
    ],
)
@pytest.mark.parametrize("by_digest", [False, True])
async def test_a_base_image_is_for_the_platform(made: Image, wanted: str, *, is_right: bool, by_digest: bool) -> None:
    with Upstream() as upstream:
        upstream.add("wt/1/lib/base", made, "1")
        async with registry_at(upstream) as registry:
            bases = Bases(registry, upstream.address)
            asked = parse_reference(f"docker.io/lib/base@{made.digest}" if by_digest else NAME)
            base = await bases.look("wt/1/lib/base", asked)
            assert (base.digest, base.problem) == ("" if by_digest else f"@{made.digest}", "")
            if is_right:
                await bases.check(base, parse_platform(wanted))
                return
            with pytest.raises(BuildFailed) as raised:
                await bases.check(base, parse_platform(wanted))
    assert raised.value.reason.startswith("missing platform: a base image does not exist for the platform")
    assert f"{asked} is for linux/" in raised.value.reason
    assert f", and not for {wanted})" in raised.value.reason


async def test_what_can_not_be_read_is_not_judged() -> None:
    with Upstream() as upstream:
        upstream.add("wt/1/lib/base", AMD, "1")
        async with registry_at(upstream, attempts=1) as registry:
            bases = Bases(registry, upstream.address)
            base = await bases.look("wt/1/lib/base", parse_reference(NAME))
            upstream.faults.status["/blobs/"] = 404
            await bases.check(base, parse_platform("linux/arm64"))
            upstream.faults.status["/manifests/"] = 503
            gone = await bases.look("wt/1/lib/base", parse_reference(NAME))
            await bases.check(gone, parse_platform("linux/arm64"))
    assert (gone.digest, gone.found) == ("", None)
    assert "docker.io/lib/base:1 (HTTP 503" in gone.problem
    assert "wt/1" not in gone.problem


async def test_an_image_with_a_token_of_its_own_is_not_pulled_twice() -> None:
    with Upstream() as upstream:
        upstream.add("wt/1/lib/base", AMD, "1")
        async with registry_at(upstream) as registry:
            bases = Bases(registry, upstream.address)
            base = await bases.look("wt/1/lib/base", parse_reference(f"{upstream.address}/wt/1/lib/base:1"))
            await bases.check(base, parse_platform("linux/amd64"))
    assert base.digest == f"@{AMD.digest}"
    assert [request.method for request in upstream.log] == ["HEAD"]

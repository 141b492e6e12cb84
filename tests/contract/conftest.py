"""The whole program, once for all the exchanges with its clients."""

from collections.abc import Iterator
from typing import NamedTuple

import pytest

from bench.images import Image, image, index, layer
from bench.upstream import Upstream
from tests.identified import issue
from tests.servers import WaveProxy, free_port

UBUNTU = image([layer({"etc/os": "ubuntu"})], env=["PATH=/bin"], cmd=["/bin/sh"], entrypoint=["/entry"])
UBUNTU_ARM = image([layer({"etc/os": "ubuntu on arm"})], platform="linux/arm64", env=["PATH=/bin"], cmd=["/bin/sh"])
TOOLS = image([layer({"opt/tools": "1"}), layer({"opt/more": "2"})], family="docker")
USER = "ada@example.org"


class Service(NamedTuple):
    """The running program, the registry that docker.io's and quay.io's images are at, and a user's access token."""

    wave: WaveProxy
    registry: Upstream
    token: str

    @property
    def address(self) -> str:
        """``host:port`` of the only port."""
        return self.wave.address


@pytest.fixture(scope="package")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One that takes builds, every one of which fails at once: BuildKit is not where it is said to be."""
    with Upstream() as registry:
        add_images(registry)
        config = "\n".join(
            (
                f'[build]\nengine = "buildkit"\nbuildkit_address = "tcp://127.0.0.1:{free_port()}"\n',
                '[quota]\npull_anonymous = "off"\nbuild_anonymous = "off"\nbuild_identified = "off"\n',
                *(f'[registries."{host}"]\nendpoint = "{registry.url}"\n' for host in ("docker.io", "quay.io")),
            )
        )
        with WaveProxy(
            tmp_path_factory.mktemp("contract") / "wave", config=config, upstreams=[registry.address]
        ) as wave:
            yield Service(wave, registry, issue(wave.redis_url, USER))


def add_images(registry: Upstream) -> None:
    """Put the images there that requests ask for."""
    registry.add("library/ubuntu", index([UBUNTU, UBUNTU_ARM]), "latest", "24.04")
    registry.add("library/alpine", UBUNTU, "latest")
    registry.add("acme/tools", TOOLS, "v1")


def platform_of(name: str) -> Image:
    """The image of ubuntu for a platform."""
    return UBUNTU_ARM if name.endswith("arm64") else UBUNTU

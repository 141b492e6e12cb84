"""What runs a build: one small interface, and the engines behind it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from wave_proxy.image.build import BuildSpec


class EngineMissing(Exception):
    """This machine can't run the engine; the text names what is missing and what to install or to set."""


@dataclass(frozen=True, slots=True)
class Job:
    """One build, ready to be run.

    ``folder`` is the workspace: ``Containerfile``, ``context/``, and room for what the engine makes. ``base_images``
    says for each repository that the container file names (``docker.io/library/ubuntu``) where the build pulls it
    (``127.0.0.1:9090/wt/<token>/library/ubuntu``, see Engine.registry). ``auth_file`` holds the credentials of
    ``spec.cache_repository``, in Docker's format. ``log`` takes what the build writes, as it comes.
    """

    spec: BuildSpec
    folder: Path
    base_images: Mapping[str, str]
    auth_file: Path | None
    log: Callable[[bytes], None]

    def named(self, text: str) -> str:
        """The text with base images by the names that the container file has for them: places have tokens."""
        for name, place in self.base_images.items():
            text = text.replace(place, name)
        return text


class Engine(Protocol):
    """Runs container files."""

    @property
    def registry(self) -> str:
        """``host:port`` under which a build sees wave-proxy: what the locations of base images begin with."""

    async def check(self) -> None:
        """Raises EngineMissing when this machine can't run builds."""

    async def build(self, job: Job) -> Path:
        """The OCI image layout (a folder in the workspace) of the built image; for several platforms of their images,
        in order, or of their index. Ending the task ends all of the build.

        Raises BuildFailed.
        """

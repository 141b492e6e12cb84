"""Mirrors that requests ask for: found done, joined, or begun (``wave.md`` §4.4 and 4.13)."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from api.answers import Outcome
from api.building.naming import hidden_id
from api.images.inspection import explained
from api.registries import Registries
from api.rules import not_enabled
from api.schema import Submission
from wave_proxy.errors import AddressRefused, Denied, HostUnknown, ManifestUnknown, NameUnknown, RequestInvalid
from wave_proxy.image.build import BuildSpec
from wave_proxy.image.mirror import mirror_hash, mirror_target
from wave_proxy.image.private import private_folder
from wave_proxy.image.reference import Reference, parse_reference
from wave_proxy.image.request import ContainerRequest, Identity
from wave_proxy.state.builds import BuildStore, no_quota
from wave_proxy.state.usage import Usage


@dataclass(frozen=True, slots=True)
class MirrorPlaces:
    """Where mirrors may go: ``authority`` is what the names of our own images begin with.

    ``kept`` are the repositories of builds and of their caches, which nobody else may put anything into.
    """

    authority: str
    kept: Iterable[str] = ()

    def check(self, source: Reference, target: Reference, asked: str) -> None:
        """Raises RequestInvalid for a target that is not allowed; ``asked`` is what the request says of it."""
        if source.registry == self.authority and source.repository.startswith("wt/"):
            raise RequestInvalid("containerImage: an image that a token stands for is mirrored by its own name only")
        if target.registry == source.registry:
            raise RequestInvalid(f"Source and target mirror registries are the same - offending value '{asked[:200]}'")
        if any(f"{_name(target)}/".startswith(f"{_name(parse_reference(kept))}/") for kept in self.kept if kept):
            raise RequestInvalid(
                f"Mirror registry not allowed - offending value '{asked[:200]}' - builds or their caches are kept "
                f"there; any other repository may be named, on this server {self.authority}/local/mirror"
            )

    def check_local(self, target: Reference, key: str, asked: str, *, is_private: bool) -> None:
        """The same for a target on this server, of the user with that key.

        Who may mirror could else put any image in the place of one that others have pushed, or show them a private one.
        """
        local = f"{self.authority}/local"
        own, shared = private_folder(local, key), f"{local}/mirror"
        if target.registry != self.authority or f"{_name(target)}/".startswith(f"{own}/"):
            return
        if is_private:
            raise RequestInvalid(
                f"buildRepository: the image is private, and a copy of it on this server begins with {own}, "
                f"got '{asked[:200]}'"
            )
        if not _name(target).startswith(f"{shared}/"):
            raise RequestInvalid(
                f"buildRepository: a mirror on this server begins with {shared}, or with your own {own}, "
                f"got '{asked[:200]}'"
            )


class Mirroring:
    """Has images mirrored, each once, however many ask for it."""

    def __init__(
        self,
        builds: BuildStore,
        registries: Registries,
        usage: Usage,
        places: MirrorPlaces,
        *,
        timeout_s: float,
        enabled: bool = True,
        secret: bytes = b"",
    ) -> None:
        """``secret`` goes into the ids of mirrors of private images."""
        self._builds = builds
        self._registries = registries
        self._usage = usage
        self._places = places
        self._timeout_s = timeout_s
        self._enabled = enabled
        self._secret = secret

    async def plan(self, request: Submission, wanted: ContainerRequest) -> BuildSpec:
        """What to mirror for a request. Raises RequestInvalid; NotImplementedHere where nothing is mirrored."""
        if not self._enabled:
            raise not_enabled("Container mirror", "mirror", "[mirror] enabled")
        source, asked = parse_reference(wanted.image), request.build_repository or ""
        target = mirror_target(source, asked)
        self._places.check(source, target, asked)
        login = await self._registries.find_login(wanted.identity, source.registry, source.repository)
        is_private = not self._registries.is_everybodys(login, source.registry, source.repository)
        self._places.check_local(target, wanted.identity.key, asked, is_private=is_private)
        known_id = mirror_hash(source, target)
        return BuildSpec(
            container_id=hidden_id(known_id, self._secret) if is_private else known_id,
            target_image=str(target),
            container_file="",
            platform="",
            build_repository=asked,
            timeout_s=self._timeout_s,
            identity=wanted.identity,
            ip_address=wanted.ip_address,
            kind="mirror",
            source_image=str(source),
            private=is_private,
        )

    async def place(self, spec: BuildSpec, *, dry_run: bool) -> Outcome:
        """Have an image mirrored, unless its copy is there or being made. Never waits for a mirror.

        Raises RequestInvalid, TooManyRequests, UpstreamUnavailable, PlatformError, StateUnavailable.
        """
        # Asked for in this order: of a mirror that ends in between, the registry says that its image is there.
        known = await self._builds.find_by_target(spec.slot)
        digest = await self._find_source(spec)
        there = await self._find_target(spec)
        if dry_run:
            return Outcome(f"{spec.series}_0", cached=there == digest, succeeded=True)
        is_same = known is not None and known.spec.source_image == spec.source_image
        if there == digest:
            is_known = known is not None and is_same and known.succeeded and known.digest == digest
            return Outcome(known.build_id if known and is_known else "", cached=True, succeeded=True)
        is_ours = parse_reference(spec.target_image).registry == self._places.authority
        if there and is_ours and not is_same and known is not None:
            raise _taken(spec, "is the mirror of another image")
        gone = known.build_id if known is not None and known.succeeded else ""
        logins = await self._registries.logins_for(spec.identity, parse_reference(spec.target_image))
        record, is_new = await self._builds.submit(
            replace(spec, source_digest=digest, logins=logins), no_quota, gone=gone
        )
        if record.spec.source_image != spec.source_image:
            raise _taken(spec, "is being mirrored from another image; try again when that has ended")
        if is_new:
            self._usage.count_job("mirrors", spec.identity.email)
        return Outcome(record.build_id, cached=record.phase == "done", succeeded=None if is_new else record.succeeded)

    async def _find_source(self, spec: BuildSpec) -> str:
        """The digest of the image to mirror. Raises RequestInvalid when it can't be read."""
        source = parse_reference(spec.source_image)
        with explained(source):
            return await self._digest_of(source, spec.identity)

    async def _find_target(self, spec: BuildSpec) -> str:
        """The digest of what has the copy's name now; empty when nothing has, or when that can't be read.

        Registries refuse to say of a repository whether it exists; whether it can be written the mirror finds out.
        """
        target = parse_reference(spec.target_image)
        try:
            return await self._digest_of(target, spec.identity)
        except (AddressRefused, HostUnknown) as err:
            raise RequestInvalid(f"buildRepository: '{spec.build_repository[:200]}' can't be used: {err}") from None
        except (Denied, ManifestUnknown, NameUnknown):
            return ""

    async def _digest_of(self, image: Reference, identity: Identity) -> str:
        registry = await self._registries.open(identity, image)
        head = await registry.head_manifest(image.registry, image.repository, image.reference, at_once=True)
        return head.digest


def _name(image: Reference) -> str:
    return f"{image.registry}/{image.repository}"


def _taken(spec: BuildSpec, why: str) -> RequestInvalid:
    return RequestInvalid(f"buildRepository: {spec.target_image} {why}")

"""Registries of every kind, an image on each, and the program in front of them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from json import loads
from pathlib import Path
from platform import machine
from typing import Any

import pytest

from bench.images import (
    BUSYBOX,
    Compression,
    Family,
    Image,
    Layer,
    digest_of,
    has_busybox,
    image,
    index,
    layer,
    random_blob,
)
from bench.upstream import Faults, Upstream
from tests.servers import PulledImage, WaveProxy, distribution, has_distribution, push, split_image

ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}.get(machine(), machine())
OTHER_ARCHITECTURE = "arm64" if ARCHITECTURE == "amd64" else "amd64"

# What every image of this folder has before it is changed.
ENTRYPOINT = ["/opt/base/entry", "first"]
CMD = ["second"]
ENV = ["PATH=/bin", "GREETING=good evening", "KEPT=yes"]
WORKING_DIR = "/opt/base"

_SAY = """#!/bin/sh
for argument; do echo "argument $argument"; done
echo "directory $(pwd)"
echo "greeting $GREETING, kept $KEPT, chain $WAVE_ENTRY_CHAIN"
"""

ADDED = layer(
    {"opt/added/": "", "opt/added/entry": _SAY + "cat /opt/added/note\n", "opt/added/note": "added by wave\n"}
)
CHANGES: Mapping[str, Any] = {
    "entrypoint": ["/opt/added/entry", "one"],
    "cmd": ["two", "three words here"],
    "env": ["GREETING=good morning", "NEW=a b"],
    "workingDir": "/opt/added",
    "layers": [ADDED.inline()],
}
CHANGED_ENV = ["PATH=/bin", "GREETING=good morning", "KEPT=yes", "NEW=a b"]
CHAIN = '["/opt/base/entry","first"]'

# What a container of the image prints, and then one of the changed image.
SAYS = f"argument first\nargument second\ndirectory {WORKING_DIR}\ngreeting good evening, kept yes, chain \n"
CHANGED_SAYS = (
    "argument one\nargument two\nargument three words here\ndirectory /opt/added\n"
    f"greeting good morning, kept yes, chain {CHAIN}\nadded by wave\n"
)

KINDS = ("docker", "oci", "index", "zstd", "large", "bearer", "basic", "redirect", "distribution", "distribution-index")
LARGE = 8 << 20  # bytes of a layer; the others are small
NAMED = "registry.test"  # a registry that is known by a name without a port: only such a one can stand in a path


@dataclass(frozen=True)
class Case:
    """One thing to pull.

    ``by`` says how it is named: by a "tag"; by the "digest" that the tag led to; or "asked", when the container request
    itself names the image by its digest.
    """

    kind: str
    changed: bool
    by: str

    def __str__(self) -> str:
        return f"{self.kind}-{'changed' if self.changed else 'plain'}-{self.by}"


CASES = tuple(
    Case(kind, changed, by)
    for kind in KINDS
    for changed in (False, True)
    for by in ("tag", "digest", *(("asked",) if kind in ("docker", "index") else ()))
)
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_tag = pytest.mark.parametrize("case", [case for case in CASES if case.by == "tag"], ids=str)


@dataclass(frozen=True)
class Source:
    """An image on its registry (``host:port``), tagged ``1.0``."""

    registry: str
    repository: str
    image: Image

    @property
    def native(self) -> Image:
        """The image itself, or the one in the index that this machine would run."""
        return self.image.children[0] if self.image.children else self.image

    def expected_config(self, *, changed: bool) -> dict[str, Any]:
        """What a client should find in the native image's config, changed or not."""
        before = self.native.config
        settings, diff_ids = dict(before["config"]), before["rootfs"]["diff_ids"]
        if changed:
            settings["Entrypoint"], settings["Cmd"] = CHANGES["entrypoint"], CHANGES["cmd"]
            settings["Env"], settings["WorkingDir"] = [*CHANGED_ENV, f"WAVE_ENTRY_CHAIN={CHAIN}"], CHANGES["workingDir"]
            diff_ids = [*diff_ids, ADDED.diff_id]
        return {"config": settings, "diff_ids": diff_ids}


class Scene:
    """The program in front of the registries, and names to pull from it. Container requests are made once each."""

    def __init__(self, wave: WaveProxy, sources: Mapping[str, Source]) -> None:
        self.wave = wave
        self._sources = sources
        self._targets: dict[tuple[str, bool, bool], str] = {}
        self._pulled: dict[str, PulledImage] = {}

    def source(self, case: Case) -> Source:
        """Where the image comes from. Skips the test when that registry is not installed."""
        if case.kind not in self._sources:
            pytest.skip("docker-registry is not installed (Debian package docker-registry)")
        return self._sources[case.kind]

    def target(self, case: Case) -> str:
        """The name to pull: ``localhost:port/wt/token/repository`` with a tag or a digest."""
        target = self._request(case, by_digest=case.by == "asked")
        return self._by_digest(target) if case.by == "digest" else target

    def _request(self, case: Case, *, by_digest: bool) -> str:
        key = case.kind, case.changed, by_digest
        if key not in self._targets:
            source = self.source(case)
            reference = f"@{source.image.digest}" if by_digest else ":1.0"
            attributes = {"containerConfig": CHANGES} if case.changed else {}
            name = f"{source.registry}/{source.repository}{reference}"
            self._targets[key] = self.wave.submit(containerImage=name, **attributes)["targetImage"]
        return self._targets[key]

    def _by_digest(self, target: str) -> str:
        return f"{target.partition('/')[0]}/{split_image(target)[0]}@{self.pulled(target).digest}"

    def pulled(self, target: str) -> PulledImage:
        """What our own careful client gets under that name."""
        if target not in self._pulled:
            self._pulled[target] = self.wave.pull(target)
        return self._pulled[target]

    def native(self, target: str) -> PulledImage:
        """The same, of an index the image that this machine would run."""
        pulled = self.pulled(target)
        return pulled.children[0] if pulled.children else pulled

    def direct(self) -> str:
        """A name without a token: the registry and the repository stand in the path."""
        return f"localhost:{self.wave.port}/{NAMED}/{self._sources['oci'].repository}:1.0"

    def unknown(self) -> str:
        """A name with a token that nobody was given."""
        return f"localhost:{self.wave.port}/wt/{'0' * 32}/test/oci:1.0"


def walk(manifest: bytes, read: Callable[[str], bytes]) -> set[str]:
    """The digests of all that a manifest or an index leads to, itself included.

    ``read`` gives the content of a digest. Raises AssertionError where content is not what its descriptor says.
    """
    document = loads(manifest)
    found = {digest_of(manifest)}
    for entry in document.get("manifests", ()):
        found |= walk(_checked(entry, read), read)
    if "config" in document:
        found |= {digest_of(_checked(entry, read)) for entry in (document["config"], *document["layers"])}
    return found


def _checked(entry: Mapping[str, Any], read: Callable[[str], bytes]) -> bytes:
    content = read(entry["digest"])
    assert (digest_of(content), len(content)) == (entry["digest"], entry["size"])
    return content


def read_layout(folder: Path, digest: str) -> bytes:
    """A blob of an OCI image layout."""
    return (folder / "blobs" / digest.replace(":", "/")).read_bytes()


# --- building it -----------------------------------------------------------------------------------------------------


@contextmanager
def open_sources(tmp: Path) -> Iterator[tuple[dict[str, Source], str]]:
    """Start the registries and fill them; gives the sources by kind, and the program's configuration for them."""
    with ExitStack() as stack:
        plain = stack.enter_context(Upstream())
        bearer = stack.enter_context(Upstream(auth="bearer"))
        basic = stack.enter_context(Upstream(auth="basic"))
        store = stack.enter_context(Upstream(host="127.0.0.2"))
        redirecting = stack.enter_context(Upstream(faults=Faults(redirect_blobs_to=store.url)))
        places = {"bearer": bearer, "basic": basic, "redirect": redirecting}
        sources = {}
        for kind in KINDS:
            if not kind.startswith("distribution"):
                place = places.get(kind, plain)
                sources[kind] = Source(place.address, f"test/{kind}", _image(kind))
                place.add(f"test/{kind}", sources[kind].image, "1.0")
        for child in (sources["redirect"].image, *sources["redirect"].image.children):
            for blob in child.blobs:
                store.add_blob("test/redirect", blob)
        addresses = [plain.address, redirecting.address, store.address]
        if has_distribution():
            addresses.append(stack.enter_context(distribution(tmp)))
            for kind in ("distribution", "distribution-index"):
                sources[kind] = Source(addresses[-1], f"test/{kind}", _image(kind))
                push(addresses[-1], f"test/{kind}", sources[kind].image, "1.0")
        yield sources, _configuration(addresses, [bearer.address, basic.address], plain.url)


def _configuration(addresses: list[str], protected: list[str], named_endpoint: str) -> str:
    tables = [f'[registries."{address}"]\ninsecure = true\nallow_private = true\n' for address in addresses + protected]
    for number in range(len(addresses), len(tables)):
        tables[number] += 'username = "user"\npassword = "secret"\n'
    tables.append(f'[registries."{NAMED}"]\nendpoint = "{named_endpoint}"\n')
    return "\n".join(tables)


@cache
def _image(kind: str) -> Image:
    match kind:
        case "docker" | "distribution":
            return _sample(kind, ARCHITECTURE, "docker")
        case "bearer":  # also an index of Docker's own kind
            return _samples(kind, "docker")
        case "index" | "redirect" | "distribution-index":
            return _samples(kind, "oci")
        case "zstd":
            return _sample(kind, ARCHITECTURE, "oci", compression="zstd")
        case "large":
            return _sample(kind, ARCHITECTURE, "docker", size=LARGE)
    return _sample(kind, ARCHITECTURE, "oci")


def _samples(kind: str, family: Family) -> Image:
    return index([_sample(kind, name, family) for name in (ARCHITECTURE, OTHER_ARCHITECTURE)], family=family)


def _sample(kind: str, architecture: str, family: Family, *, compression: Compression = "gzip", size: int = 0) -> Image:
    # The second layer differs from kind to kind, so that no client finds it in its store already.
    files: dict[str, bytes | str] = {"opt/base/kind": f"{kind} {architecture}\n", "opt/base/data": random_blob(size, 1)}
    return image(
        [_shell(compression), layer(files, compression=compression)],
        family=family,
        platform=f"linux/{architecture}",
        entrypoint=ENTRYPOINT,
        cmd=CMD,
        env=ENV,
        working_dir=WORKING_DIR,
    )


@cache
def _shell(compression: Compression) -> Layer:
    files: dict[str, bytes | str] = {"bin/": "", "etc/": "", "opt/": "", "opt/base/": "", "opt/base/entry": _SAY}
    files["etc/passwd"] = "root:x:0:0:root:/:/bin/sh\n"
    if has_busybox():
        files["bin/busybox"] = BUSYBOX.read_bytes()
    links = {f"bin/{name}": "busybox" for name in ("sh", "cat", "true")}
    return layer(files, links=links, compression=compression)


def shell_layer() -> Layer | None:
    """A tar that is enough to run a shell in. None when this machine has no busybox to put into it."""
    return _shell("none") if has_busybox() else None

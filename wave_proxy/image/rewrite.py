"""A container request's settings and layers put into an image: pure functions from bytes to bytes.

The same settings over the same bytes give the same bytes on any machine: nothing here reads a clock or reorders keys.
"""

from collections.abc import Iterable, Mapping

import orjson

from wave_proxy._fast.manifest import append_items, set_member
from wave_proxy.errors import UpstreamError, clip
from wave_proxy.image.oci import DOCKER_LAYER, DOCKER_MANIFEST, OCI_LAYER, Descriptor, read_json_object
from wave_proxy.image.request import ContainerConfig, Layer

_ENTRY_CHAIN = "WAVE_ENTRY_CHAIN"


def layers_for(layers: tuple[Layer, ...], architecture: str) -> tuple[Layer, ...]:
    """The layers that belong into an image of that architecture, in the order of the request."""
    return tuple(layer for layer in layers if layer.fits(architecture))


def architecture_of(config: bytes) -> str:
    """The architecture that an image's config names, empty when it names none. Raises UpstreamError."""
    architecture = read_json_object(config, "image config").get("architecture")
    return architecture if isinstance(architecture, str) else ""


def rewrite_config(config: bytes, changes: ContainerConfig, layers: tuple[Layer, ...]) -> bytes:
    """The image config with the changes applied and ``layers`` added to it.

    Entrypoint, Cmd and WorkingDir replace what was there; Cmd stays when only the entrypoint changes. A variable that
    the image has already is replaced in place, others follow. An image that had an entrypoint gets it handed on in
    ``WAVE_ENTRY_CHAIN``. ``history`` grows with ``rootfs.diff_ids``, where the image has one.
    Raises UpstreamError when the config lacks what the image-spec requires. Source: ``wave.md`` §3.3.
    """
    document = read_json_object(config, "image config")
    settings = document.get("config")
    if settings is None:
        config, settings = set_member(config, ("config",), b"{}"), {}
    rootfs = document.get("rootfs")
    if not isinstance(settings, dict) or not isinstance(rootfs, dict):
        raise UpstreamError("image config has no settings or no rootfs that are objects")
    _strings(rootfs.get("diff_ids"))
    old_entrypoint = settings.get("Entrypoint")
    if changes.entrypoint:
        config = set_member(config, ("config", "Entrypoint"), orjson.dumps(changes.entrypoint))
    if changes.cmd:
        config = set_member(config, ("config", "Cmd"), orjson.dumps(changes.cmd))
    if changes.working_dir:
        config = set_member(config, ("config", "WorkingDir"), orjson.dumps(changes.working_dir))
    env = list(changes.env)
    if old_entrypoint:
        env.append(f"{_ENTRY_CHAIN}={_entry_chain(old_entrypoint)}")
    if env:
        config = set_member(config, ("config", "Env"), orjson.dumps(merge_env(_strings(settings.get("Env")), env)))
    if layers:
        config = append_items(config, ("rootfs", "diff_ids"), _join(layer.tar_digest for layer in layers))
        if isinstance(document.get("history"), list):
            config = append_items(config, ("history",), _join(_history(layer) for layer in layers))
    return config


def _strings(value: object) -> list[str]:
    """A list of strings that may be null or missing. Raises UpstreamError."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UpstreamError(f"image config has something else where a list of strings belongs: {clip(value)}")
    return value


def merge_env(old: list[str], new: list[str]) -> list[str]:
    """``old`` with the variables of ``new``: replaced where a name is known, added at the end where not."""
    merged = {variable.partition("=")[0]: variable for variable in old}
    merged.update((variable.partition("=")[0], variable) for variable in new)
    return list(merged.values())


def _entry_chain(entrypoint: object) -> str:
    match entrypoint:
        case str(text) | [str(text)]:
            return text
    return orjson.dumps(entrypoint).decode()


def _history(layer: Layer) -> dict[str, str]:
    return {"created": "1970-01-01T00:00:00Z", "created_by": f"wave-proxy: layer {layer.gzip_digest}"}


def _join(values: Iterable[object]) -> bytes:
    return orjson.dumps(list(values))[1:-1]


def rewrite_manifest(manifest: bytes, media_type: str, config: Descriptor, layers: tuple[Layer, ...]) -> bytes:
    """The manifest with the config's new digest and size, and a descriptor for each added layer at the end."""
    manifest = set_member(manifest, ("config", "digest"), orjson.dumps(config.digest))
    manifest = set_member(manifest, ("config", "size"), b"%d" % config.size)
    if layers:
        manifest = append_items(manifest, ("layers",), _join(_descriptor(layer, media_type) for layer in layers))
    return manifest


def _descriptor(layer: Layer, manifest_type: str) -> dict[str, str | int]:
    default = DOCKER_LAYER if manifest_type == DOCKER_MANIFEST else OCI_LAYER
    return {"mediaType": layer.media_type or default, "size": layer.gzip_size, "digest": layer.gzip_digest}


def rewrite_index(index: bytes, replaced: Mapping[int, Descriptor]) -> bytes:
    """The index with new digests and sizes for the entries at the given positions; the others stay as they are."""
    for position, descriptor in replaced.items():
        index = set_member(index, ("manifests", position, "digest"), orjson.dumps(descriptor.digest))
        index = set_member(index, ("manifests", position, "size"), b"%d" % descriptor.size)
    return index

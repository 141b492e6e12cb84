"""What images look like in answers (``wave.md`` §9.2 and §9.3): their members by the names that clients parse.

What a registry sends is not trusted to have the types that it should: a member of another type is left out.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from re import compile as compile_pattern
from typing import Any

from api.answers import filled
from wave_proxy.image.oci import OCI_INDEX, OCI_MANIFEST
from wave_proxy.image.reference import Reference
from wave_proxy.image.schema1 import layers_of

_INSTANT = compile_pattern(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d{1,9})?(Z|[+-]\d\d:\d\d)")


def described_index(document: Mapping[str, Any], media_type: str, digest: str) -> dict[str, Any]:
    """An index with what it names; ``media_type`` is what it came as, for documents that do not say."""
    entries = [entry for entry in _list(document.get("manifests")) if isinstance(entry, dict)]
    return filled(
        {
            "schemaVersion": _number(document.get("schemaVersion")),
            "mediaType": media_type,
            "manifests": [filled({**_descriptor(entry), "platform": _platform(entry)}) for entry in entries],
            "digest": digest,
        }
    )


def described_image(
    image: Reference, host_name: str, digest: str, manifest: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Any]:
    """An image of one platform, whose manifest and config are as ``described_manifest`` and ``described_config`` say.

    ``digest`` is the manifest's, ``host_name`` where the registry is, scheme included.
    """
    is_v1 = manifest.get("schemaVersion") == 1
    return {
        "registry": image.registry,
        "hostName": host_name,
        "imageName": image.repository,
        "reference": image.reference,
        "digest": digest,
        "config": config,
        "manifest": manifest,
        "v1": is_v1,
        "v2": not is_v1,
        "oci": manifest.get("mediaType") in (OCI_MANIFEST, OCI_INDEX),
    }


def described_manifest(document: Mapping[str, Any], media_type: str) -> dict[str, Any]:
    """A manifest; ``media_type`` is what it came as, for documents that do not say."""
    config, layers = document.get("config"), _list(document.get("layers"))
    return filled(
        {
            "schemaVersion": _number(document.get("schemaVersion")),
            "mediaType": media_type,
            "config": _descriptor(config) if isinstance(config, dict) else None,
            "layers": [_descriptor(layer) for layer in layers if isinstance(layer, dict)],
            "annotations": _texts_by_name(document.get("annotations")),
            "artifactType": _text(document.get("artifactType")),
        }
    )


def described_schema1(document: dict[str, Any], media_type: str) -> dict[str, Any]:
    """A schema-1 manifest in the same form: of its layers only the digests are known. Raises UpstreamError."""
    return {
        "schemaVersion": 1,
        "mediaType": media_type,
        "layers": [{"digest": digest} for digest in layers_of(document)],
    }


def described_config(document: Mapping[str, Any]) -> dict[str, Any]:
    """An image's config: what a container made of it starts with, and the digests of its unpacked layers."""
    settings, rootfs = document.get("config"), document.get("rootfs")
    return filled(
        {
            "architecture": _text(document.get("architecture")),
            "config": _settings(settings) if isinstance(settings, dict) else None,
            "container": _text(document.get("container")),
            "created": _instant(document.get("created")),
            "rootfs": _rootfs(rootfs) if isinstance(rootfs, dict) else None,
        }
    )


def _settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    return filled(
        {
            "hostName": _text(settings.get("Hostname")),
            "domainName": _text(settings.get("Domainname")),
            "user": _text(settings.get("User")),
            "attachStdin": settings.get("AttachStdin") is True,
            "attachStdout": settings.get("AttachStdout") is True,
            "attachStderr": settings.get("AttachStderr") is True,
            "tty": settings.get("Tty") is True,
            "env": _texts(settings.get("Env")),
            "cmd": _texts(settings.get("Cmd")),
            "image": _text(settings.get("Image")),
            "workingDir": _text(settings.get("WorkingDir")),
            "entrypoint": _texts(settings.get("Entrypoint")),
            "labels": _texts_by_name(settings.get("Labels")),
        }
    )


def _rootfs(rootfs: Mapping[str, Any]) -> dict[str, Any]:
    return filled({"type": _text(rootfs.get("type")), "diff_ids": _texts(rootfs.get("diff_ids"))})


def _descriptor(value: Mapping[str, Any]) -> dict[str, Any]:
    return filled(
        {
            "mediaType": _text(value.get("mediaType")),
            "digest": _text(value.get("digest")),
            "size": _number(value.get("size")),
            "annotations": _texts_by_name(value.get("annotations")),
        }
    )


def _platform(entry: Mapping[str, Any]) -> dict[str, Any] | None:
    platform = entry.get("platform")
    if not isinstance(platform, dict):
        return None
    names = ("architecture", "os", "variant", "os.version")
    return filled(
        {name: _text(platform.get(name)) for name in names} | {"os.features": _texts(platform.get("os.features"))}
    )


# --- values ----------------------------------------------------------------------------------------------------------


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _number(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _texts(value: object) -> list[str]:
    """An array of texts; images made by older tools have a single text in place of one."""
    return [text for text in ([value] if isinstance(value, str) else _list(value)) if isinstance(text, str)]


def _texts_by_name(value: object) -> dict[str, str] | None:
    if not isinstance(value, dict):
        return None
    return {name: text for name, text in value.items() if isinstance(text, str)} or None


def _instant(value: object) -> str | None:
    """A time as ISO-8601 in UTC with ``Z``, to the digit; None for what clients' parsers would stop at."""
    match = _INSTANT.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return None
    moment, fraction, zone = match.groups(default="")
    try:
        time = datetime.fromisoformat(moment + zone.replace("Z", "+00:00")).astimezone(UTC)
    except (ValueError, OverflowError):
        return None
    return f"{time.replace(tzinfo=None).isoformat()}{fraction}Z"

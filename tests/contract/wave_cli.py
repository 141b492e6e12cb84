"""The ``wave`` command line, versions 1.5 to 1.8 and its predecessors: what it sends for each option, and how it reads.

It is ``java.net.http`` of JDK 17 with Moshi behind it. Whatever makes it print a stack trace raises Broken here.
"""

import json
import re
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from time import monotonic, sleep
from typing import Any

from tests.contract.archives import Files, pack
from tests.contract.wire import (
    Answer,
    Broken,
    Connection,
    Headers,
    Number,
    is_boolean,
    is_counts,
    is_duration,
    is_instant,
    is_integer,
    is_text,
    is_texts,
)
from tests.patience import PATIENCE_S

OLDEST_SERVER = (1, 31, 0)
RETRIED = (502, 503, 504)
MANIFEST_TYPES = (
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v1+prettyjws",
    "application/vnd.docker.distribution.manifest.v1+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.oci.image.index.v1+json",
)


class Failed(Exception):
    """What it prints before it ends with 1."""


# --- what it sends ---------------------------------------------------------------------------------------------------


def headers(address: str, body: bytes = b"") -> Headers:
    """Those of every request in their order; a GET has them too."""
    return (
        ("Content-Length", str(len(body))),
        ("Host", address),
        ("User-Agent", "Java-http-client/17.0.15"),
        ("Content-Type", "application/json"),
    )


def base64(text: str) -> str:
    """As it encodes files: the standard alphabet, padded."""
    return b64encode(text.encode()).decode()


def conda(*packages: str, file: str = "", channels: str = "conda-forge,bioconda", **options: Any) -> dict[str, Any]:
    """``--conda…`` and ``--pixi…``: options of both templates are sent, whichever is asked for.

    ``options`` are base_image, run_command, pixi_image, pixi_base_image, pixi_base_packages, pixi_run_command.
    """
    chosen: dict[str, Any] = {
        "type": "CONDA",
        "channels": re.split(r"[, ]+", channels),
        "condaOpts": {
            "baseImage": "ubuntu:24.04",
            "basePackages": "conda-forge::procps-ng",
            "commands": options.get("run_command"),
            "mambaImage": options.get("base_image", "mambaorg/micromamba:1.5.10-noble"),
        },
        "pixiOpts": {
            "baseImage": options.get("pixi_base_image", "ubuntu:24.04"),
            "basePackages": options.get("pixi_base_packages", "conda-forge::procps-ng"),
            "commands": options.get("pixi_run_command"),
            "pixiImage": options.get("pixi_image", "public.cr.seqera.io/wave/pixi:0.61.0-noble"),
        },
    }
    return {"packages": chosen | ({"environment": base64(file)} if file else {"entries": list(packages)})}


def cran(*packages: str, base_image: str = "rocker/r-ver:4.4.1", run_command: Sequence[str] = ()) -> dict[str, Any]:
    """``--cran…``."""
    options = {"basePackages": "littler r-cran-docopt", "commands": list(run_command) or None, "rImage": base_image}
    return {"packages": {"type": "CRAN", "entries": list(packages), "cranOpts": options}}


def configured(file: Mapping[str, Any] | None = None, layers: Sequence[Files] = (), **settings: Any) -> dict[str, Any]:
    """``--config-file``, over which ``--config-…`` go, and ``--layer``."""
    config = dict(file or {}) | settings
    config["layers"] = [*config.get("layers", ()), *map(pack, layers)]
    return {"containerConfig": config}


def submission(*parts: Mapping[str, Any], **attributes: Any) -> bytes:
    """The body that it sends: keys in alphabetical order, nothing that is null, and what is always there."""
    document: dict[str, Any] = {
        "dryRun": False,
        "freeze": False,
        "mirror": False,
        "timestamp": datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "123Z"),
        "towerEndpoint": "https://api.cloud.seqera.io",
    }
    for part in (*parts, attributes):
        document |= part
    return json.dumps(_without_nulls(document), sort_keys=True, separators=(",", ":")).encode()


def _without_nulls(value: Any) -> Any:
    match value:
        case dict():
            return {key: _without_nulls(member) for key, member in value.items() if member is not None}
        case list():
            return [_without_nulls(member) for member in value]
        case _:
            return value


# --- how it reads ----------------------------------------------------------------------------------------------------

Check = Callable[[object], bool]
Shape = Mapping[str, "Check | Shape"]

_SUBMITTED: Shape = {
    **dict.fromkeys(("requestId", "containerToken", "targetImage", "containerImage", "buildId", "scanId"), is_text),
    **dict.fromkeys(("cached", "freeze", "mirror", "succeeded"), is_boolean),
    "expiration": is_instant,
}
_STATUS: Shape = {
    "id": is_text,
    "status": lambda value: value in ("PENDING", "BUILDING", "SCANNING", "DONE"),
    **dict.fromkeys(("buildId", "mirrorId", "scanId", "reason", "detailsUri"), is_text),
    "succeeded": is_boolean,
    "vulnerabilities": is_counts,
    "creationTime": is_instant,
    "duration": is_duration,
}
_BUILD_STATUS: Shape = {
    "id": is_text,
    "status": lambda value: value in ("PENDING", "COMPLETED"),
    "startTime": is_instant,
    "duration": is_duration,
    "succeeded": is_boolean,
}
_BLOB: Shape = {"mediaType": is_text, "digest": is_text, "size": is_integer}
_CONTAINER: Shape = {
    **dict.fromkeys(("registry", "hostName", "imageName", "reference", "digest"), is_text),
    "config": {
        **dict.fromkeys(("architecture", "container"), is_text),
        "created": is_instant,
        "config": {
            **dict.fromkeys(("hostName", "domainName", "user", "image", "workingDir"), is_text),
            **dict.fromkeys(("attachStdin", "attachStdout", "attachStderr", "tty"), is_boolean),
            **dict.fromkeys(("env", "cmd", "entrypoint"), is_texts),
        },
        "rootfs": {"type": is_text, "diff_ids": is_texts},
    },
    "manifest": {"schemaVersion": is_integer, "mediaType": is_text, "config": _BLOB, "artifactType": is_text},
    **dict.fromkeys(("v1", "v2", "oci"), is_boolean),
}
_ENTRY: Shape = {**_BLOB, "platform": dict.fromkeys(("architecture", "os", "variant"), is_text)}
_INDEX: Shape = {"schemaVersion": is_integer, "mediaType": is_text, "digest": is_text}


def read(answer: Answer, shape: Shape) -> dict[str, Any]:
    """The document of an answer of that shape: what is unknown is skipped, what is null or absent may be.

    Raises Failed for any other status than 200, with what it prints.
    """
    if answer.status != 200:
        raise Failed(f"Wave invalid response: [{answer.status}] {answer.text}")
    document = answer.document()
    _check(document, shape, "")
    return document


def _check(document: object, shape: Shape, path: str) -> None:
    if not isinstance(document, dict):
        raise Broken(f"{path or 'the answer'} is no object: {document!r}")
    for name, rule in shape.items():
        value = document.get(name)
        if value is None:
            continue
        if isinstance(rule, Mapping):
            _check(value, rule, f"{path}{name}.")
        elif not rule(value):
            raise Broken(f"{path}{name} is {value!r}")


def read_submitted(answer: Answer) -> dict[str, Any]:
    """The answer to a container request."""
    document = read(answer, _SUBMITTED)
    if not document.get("targetImage"):
        raise Broken(f"nothing to print: {answer.text}")
    return document


def read_status(answer: Answer) -> dict[str, Any]:
    """The answer of ``/status``."""
    document = read(answer, _STATUS)
    if "status" not in document:
        raise Broken(f"no status: {answer.text}")
    return document


def read_build_status(answer: Answer) -> dict[str, Any]:
    """The answer of a build's ``/status``, as 1.3 and 1.4 read it."""
    return read(answer, _BUILD_STATUS)


def read_inspected(answer: Answer) -> dict[str, Any]:
    """The answer to ``--inspect``; each layer with the address that it prints."""
    document = read(answer, {"container": _CONTAINER, "index": _INDEX})
    if "container" in document:
        container = document["container"]
        for blob in container["manifest"].get("layers", ()):
            _check(blob, _BLOB, "layers.")
            blob["uri"] = f"{container['hostName']}/v2/{container['imageName']}/blobs/{blob['digest']}"
    elif "index" in document:
        for entry in document["index"]["manifests"]:
            _check(entry, _ENTRY, "manifests.")
    else:
        raise Broken(f"neither container nor index: {answer.text}")
    return document


def read_service_info(answer: Answer) -> str:
    """The version that ``--info`` prints."""
    info = read(answer, {"serviceInfo": {"version": is_text, "commitId": is_text}})["serviceInfo"]
    found = re.fullmatch(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)", info["version"])
    if not found:
        raise Broken(f"{info['version']} is no strict semantic version")
    if tuple(map(int, found.groups())) < OLDEST_SERVER:
        raise Broken(f"{info['version']} is too old")
    return str(info["version"])


# --- a run -----------------------------------------------------------------------------------------------------------


@dataclass
class WaveCli:
    """Runs of the program, against the service at ``host:port``."""

    address: str
    pause_s: float = 10.0  # between questions of --await

    def post(self, path: str, body: bytes) -> Answer:
        """One request, on a connection of its own as each run has."""
        with Connection(self.address) as connection:
            return connection.ask("POST", path, headers(self.address, body), body)

    def get(self, path: str) -> Answer:
        """A GET, with the headers of JDK 17."""
        with Connection(self.address) as connection:
            return connection.ask("GET", path, headers(self.address))

    def submit(self, body: bytes, path: str = "/v1alpha2/container") -> dict[str, Any]:
        """The answer to a container request."""
        return read_submitted(self.post(path, body))

    def await_(self, submitted: Mapping[str, Any], limit_s: float = PATIENCE_S) -> dict[str, Any] | None:
        """``--await``: how it ended; None when there is nothing to wait for. Raises Failed as the program does."""
        if submitted.get("requestId") is None or submitted.get("succeeded") is not None:
            return None
        path, deadline = f"/v1alpha2/container/{submitted['requestId']}/status", monotonic() + limit_s
        with Connection(self.address) as connection:
            while True:
                found = read_status(connection.ask("GET", path, headers(self.address)))
                if found["status"] == "DONE":
                    break
                if monotonic() > deadline:
                    raise Failed("Container provisioning did not complete within the max await time")
                sleep(self.pause_s)
        if found.get("succeeded") is False:
            lines = ["Container provisioning did not complete successfully"]
            lines += [f"- Reason: {found['reason']}"] if found.get("reason") else []
            lines += [f"- Find out more here: {found['detailsUri']}"] if found.get("detailsUri") else []
            raise Failed("\n".join(lines))
        return found


def number(value: object) -> int:
    """A whole number of a checked document."""
    assert isinstance(value, Number)
    return int(value)


def held_manifest(address: str, target_image: str) -> Answer:
    """``--await`` of 1.0 to 1.2: one GET, whose address is made of the image's name as that program makes it."""
    rest = target_image.partition("/")[2]
    if rest.count(":") != 1:
        raise Broken(f"{target_image} does not become an address")
    types = tuple(("Accept", name) for name in MANIFEST_TYPES)
    with Connection(address) as connection:
        return connection.ask("GET", f"/v2/{rest.replace(':', '/manifests/')}", (*headers(address), *types))

"""Nextflow's plugin nf-wave, of versions 22.10 to 26: bodies with every property, and its readers.

Gson is lenient about types and unknown members; what nf-wave does with the values is not.
"""

import json
import re
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from secrets import token_hex
from time import monotonic, sleep
from typing import Any

from tests.contract.wire import Answer, Broken, Connection, Headers, is_instant
from tests.patience import PATIENCE_S

RETRIED = (429, 500, 502, 503, 504)
STATUS = ("PENDING", "BUILDING", "SCANNING", "DONE")

# In the order of their declaration; whatever is not given is sent as null.
PROPERTIES = (
    "towerAccessToken",
    "towerRefreshToken",
    "towerWorkspaceId",
    "towerEndpoint",
    "containerImage",
    "containerFile",
    "containerConfig",
    "containerPlatform",
    "buildRepository",
    "cacheRepository",
    "timestamp",
    "fingerprint",
    "freeze",
    "format",
    "dryRun",
    "workflowId",
    "containerIncludes",
    "packages",
    "nameStrategy",
    "mirror",
    "scanMode",
    "scanLevels",
    "buildCompression",
    "buildTemplate",
)
CONFIG = ("entrypoint", "cmd", "env", "workingDir", "layers")
LAYER = ("location", "gzipDigest", "gzipSize", "tarDigest", "skipHashing")
PACKAGES = ("type", "environment", "entries", "condaOpts", "pixiOpts", "cranOpts", "channels")
CONDA_OPTIONS = ("mambaImage", "commands", "basePackages", "baseImage")
COMPRESSION = ("mode", "level", "force")


class Failed(Exception):
    """What it tells the user."""


# --- what it sends ---------------------------------------------------------------------------------------------------


def filled(names: tuple[str, ...], given: Mapping[str, Any]) -> dict[str, Any]:
    """All the properties of an object, in their order."""
    assert not given.keys() - set(names), f"unknown: {given.keys() - set(names)}"
    return {name: given.get(name) for name in names}


def config(**given: Any) -> dict[str, Any]:
    """A container config, which nearly every request has, mostly of nulls."""
    layers = given.get("layers")
    whole = [filled(LAYER, layer) for layer in layers] if layers is not None else None
    return filled(CONFIG, given | {"layers": whole})


def conda(*entries: str, channels: tuple[str, ...] = ("conda-forge", "bioconda")) -> dict[str, Any]:
    """Conda packages."""
    return filled(PACKAGES, {"type": "CONDA", "entries": list(entries), **_conda(), "channels": list(channels)})


def conda_file(text: str) -> dict[str, Any]:
    """Conda packages of a local file, which has its own channels."""
    return filled(PACKAGES, {"type": "CONDA", "environment": base64(text), **_conda()})


def base64(text: str) -> str:
    """As it encodes files."""
    return b64encode(text.encode()).decode()


def _conda() -> dict[str, Any]:
    options = {
        "mambaImage": "mambaorg/micromamba:1.5.10-noble",
        "basePackages": "conda-forge::procps-ng",
        "baseImage": "ubuntu:24.04",
    }
    return {"condaOpts": filled(CONDA_OPTIONS, options)}


def submission(**given: Any) -> bytes:
    """The body of a request, nulls included, as Groovy's JsonOutput writes it."""
    usual = {
        "towerEndpoint": "https://api.cloud.seqera.io",
        "containerConfig": config(),
        "containerPlatform": "linux/amd64",
        "timestamp": datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "026Z"),
        "fingerprint": token_hex(16),
        "freeze": False,
        "dryRun": False,
        "mirror": False,
    }
    return json.dumps(filled(PROPERTIES, usual | given), separators=(",", ":")).encode()


# --- how it reads ----------------------------------------------------------------------------------------------------


def read(answer: Answer, method: str, url: str) -> dict[str, Any]:
    """The object in an answer. Raises Failed with what it tells the user for any other status than 200."""
    if answer.status != 200:
        raise Failed(f"Wave invalid response: {method} {url} [{answer.status}] {answer.text}")
    return answer.document()


def read_submitted(document: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """The name of the image as it is used for a task that asked for this. Raises Broken."""
    target = document.get("targetImage")
    if not isinstance(target, str) or not target:
        raise Broken(f"no targetImage: {document}")
    if asked.get("format") == "sif" and not target.startswith("oras://"):
        raise Broken(f"singularity can't pull {target}")
    if asked.get("format") != "sif" and "://" in target:
        raise Broken(f"{target} has a scheme")
    if asked.get("mirror") and document.get("mirror") is not True:
        raise Broken("the id would be taken for a build's")
    return target


def read_status(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state of a container request; ``creationTime`` is parsed whatever the state is."""
    if document.get("status") not in STATUS:
        raise Broken(f"status is {document.get('status')!r}")
    if not is_instant(document.get("creationTime")):
        raise Broken(f"creationTime is {document.get('creationTime')!r}: NullPointerException: text")
    return document


def read_build_status(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state of a build, as 24.04 reads it: ``duration`` is a number of seconds."""
    if document.get("status") not in ("PENDING", "COMPLETED"):
        raise Broken(f"status is {document.get('status')!r}")
    if document.get("startTime") is not None and not is_instant(document["startTime"]):
        raise Broken(f"startTime is {document['startTime']!r}")
    if not re.fullmatch(r"\d+(\.\d+)?", document.get("duration", "0")):
        raise Broken(f"duration is {document['duration']!r}")
    return document


# --- a run -----------------------------------------------------------------------------------------------------------


@dataclass
class Nextflow:
    """A run, against the service at ``host:port``; with a ``token`` every call carries it as a header too."""

    address: str
    token: str = ""
    pause_s: float = 0.1  # the local executor's poll interval

    def headers(self, body: bytes | None) -> Headers:
        """Those of a request; ``body`` is None for a GET."""
        trace = () if body is None else (("Traceparent", f"00-{token_hex(16)}-{token_hex(8)}-01"),)
        bearer = (("Authorization", f"Bearer {self.token}"),) if self.token else ()
        return (
            ("Content-Length", str(len(body or b""))),
            ("Host", self.address),
            ("User-Agent", "Java-http-client/17.0.15"),
            *bearer,
            ("Content-Type", "application/json"),
            *trace,
        )

    def ask(self, method: str, path: str, body: bytes | None = None) -> Answer:
        """One request."""
        with Connection(self.address) as connection:
            return connection.ask(method, path, self.headers(body), body or b"")

    def submit(self, **asked: Any) -> dict[str, Any]:
        """The answer to a container request, which was checked."""
        if self.token:
            asked = {"towerAccessToken": self.token, **asked}
        path = "/v1alpha2/container"
        answer = self.ask("POST", path, submission(**asked))
        document = read(answer, "POST", f"http://{self.address}{path}")
        read_submitted(document, asked)
        return document

    def await_(self, submitted: Mapping[str, Any], limit_s: float = PATIENCE_S) -> None:
        """Return when the container is ready. Raises Failed."""
        if submitted.get("succeeded") is True:
            return
        deadline = monotonic() + limit_s
        path = f"/v1alpha2/container/{submitted['requestId']}/status"
        with Connection(self.address) as connection:
            while True:
                answer = connection.ask("GET", path, self.headers(None))
                found = read_status(read(answer, "GET", f"http://{self.address}{path}"))
                if found["status"] == "DONE":
                    break
                assert monotonic() < deadline, "exceeded the time that a build may take"
                sleep(self.pause_s)
        if found.get("succeeded") is not True:
            text = f"Wave provisioning for container '{submitted['targetImage']}' did not complete successfully"
            text += f"\n- Reason: {found['reason']}" if found.get("reason") else ""
            text += f"\n- Find out more here: {found['detailsUri']}" if found.get("detailsUri") else ""
            raise Failed(text)

"""Clients pull over TLS that the program speaks itself."""

import json
import ssl
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPSConnection
from pathlib import Path
from subprocess import run

import pytest

from tests.clients.programs import Client, find, needs
from tests.clients.scene import CHANGES, LARGE, Source, read_layout, walk
from tests.servers import WaveProxy

pytestmark = needs("openssl", "Debian package openssl")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a certificate for localhost (ca.crt) and its key (key.pem)."""
    folder = tmp_path_factory.mktemp("certificate")
    command = [find("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-days", "2"]
    run([*command, "-out", folder / "ca.crt", "-keyout", folder / "key.pem"], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def target(
    sources: tuple[dict[str, Source], str], certificate: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The name of a large changed image, on a program that speaks nothing but TLS."""
    found, config = sources
    arguments = ["--tls-cert", str(certificate / "ca.crt"), "--tls-key", str(certificate / "key.pem")]
    with WaveProxy(tmp_path_factory.mktemp("tls") / "data", config=config, args=arguments) as wave:
        asked = {"containerImage": f"{found['large'].registry}/test/large:1.0", "containerConfig": CHANGES}
        context = ssl.create_default_context(cafile=certificate / "ca.crt")
        with closing(HTTPSConnection("localhost", wave.port, context=context)) as connection:
            connection.request("POST", "/v1alpha2/container", json.dumps(asked), {"Content-Type": "application/json"})
            yield json.load(connection.getresponse())["targetImage"]


@needs("skopeo", "Debian package skopeo")
def test_skopeo(target: str, certificate: Path, folder: Path) -> None:
    options = ["--insecure-policy", "copy", "--all", f"--src-cert-dir={certificate}"]
    Client("skopeo")(*options, f"docker://{target}", f"dir:{folder}")
    manifest = (folder / "manifest.json").read_bytes()
    assert len(walk(manifest, lambda digest: (folder / digest.removeprefix("sha256:")).read_bytes())) == 5
    assert max(layer["size"] for layer in json.loads(manifest)["layers"]) > LARGE


@needs("crane", "go install github.com/google/go-containerregistry/cmd/crane@v0.20.3")
def test_crane(target: str, certificate: Path, folder: Path) -> None:
    crane = Client("crane", env={"SSL_CERT_FILE": str(certificate / "ca.crt")})
    crane("pull", "--format=oci", target, folder)
    (entry,) = json.loads((folder / "index.json").read_bytes())["manifests"]
    assert crane("digest", target).strip() == entry["digest"]
    assert len(walk(read_layout(folder, entry["digest"]), lambda digest: read_layout(folder, digest))) == 5

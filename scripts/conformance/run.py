"""Runs the distribution spec's conformance suite against a freshly started ``wave-proxy serve``: ``make conformance``.

The suite is built from the module that go.mod beside this file names, once, into build/. Its report is left there too.
"""

import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from secrets import token_hex
from shutil import which
from tempfile import TemporaryDirectory

from tests.servers import ROOT, WaveProxy

HERE = Path(__file__).parent
MODULE = "github.com/opencontainers/distribution-spec/conformance"
BUILT = ROOT / "build" / "conformance"

# What is optional in version 1.1 of the spec, and is held here. Everything else is on unless it is said otherwise.
MORE = {"BLOBS_DIGEST_HEADER": "true", "BLOBS_UPLOAD_CANCEL": "true", "MANIFESTS_DIGEST_HEADER": "true"}

# Whole categories: a suite that left one of them out would not say so with its exit code.
MUST_PASS = (
    *("Blob push", "Blob post only", "Blob post put", "Blob chunked", "Blob streaming", "Blob mount"),
    *("Blob anonymous mount", "Blob upload cancel", "Blob get", "Blob get range", "Blob head"),
    *("Manifest put by digest", "Manifest put by tag", "Manifest put with subject"),
    *("Manifest get by digest", "Manifest get by tag", "Manifest head by digest", "Manifest head by tag"),
    *("Tag listing", "Referrers", "Ping"),
    *("Tag delete", "Tag delete atomic", "Manifest delete", "Manifest delete atomic", "Blob delete"),
    *("Blob delete atomic", "OCI Conformance Result"),
)


def main() -> int:
    """The exit code: 0 when all of it passes, and where there is no Go, or no suite to be had."""
    suite = BUILT / "suite"
    if which("go") is None:
        print("conformance: SKIPPED, for the suite is a Go program and Go is not installed (1.24 or newer)")
        return 0
    BUILT.mkdir(parents=True, exist_ok=True)
    if subprocess.run(["go", "mod", "download"], cwd=HERE, check=False).returncode:
        print("conformance: SKIPPED, for the suite's modules can't be downloaded")
        return 0
    if subprocess.run(["go", "build", "-buildvcs=false", "-o", str(suite), MODULE], cwd=HERE, check=False).returncode:
        print("conformance: the suite could not be built")
        return 1
    user, password = "conformance", token_hex(16)
    account = f'[accounts]\n{user} = "sha256:{sha256(password.encode()).hexdigest()}"\n'
    with TemporaryDirectory(prefix="conformance-") as folder, WaveProxy(Path(folder) / "data", config=account) as wave:
        report = run(suite, wave.address, user, password)
    print(report)
    failed = [name for name in MUST_PASS if not passes(report, name)]
    print(f"conformance: {'FAILED: ' + ', '.join(failed) if failed else 'passed'}; report in {BUILT}/report.html")
    return 1 if failed else 0


def run(suite: Path, address: str, user: str, password: str) -> str:
    """What the suite prints when it is run to its end."""
    environment = {
        "OCI_VERSION": "1.1",
        "OCI_REGISTRY": address,
        "OCI_TLS": "disabled",
        "OCI_REPO1": "local/conformance/one",
        "OCI_REPO2": "local/conformance/two",
        "OCI_USERNAME": user,
        "OCI_PASSWORD": password,
        "OCI_RESULTS_DIR": str(BUILT),
        **{f"OCI_API_{name}": value for name, value in MORE.items()},
    }
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("OCI_")}
    finished = subprocess.run(
        [suite], cwd=BUILT, env={**inherited, **environment}, stdout=subprocess.PIPE, text=True, check=False
    )
    return finished.stdout


def passes(report: str, name: str) -> bool:
    """Whether the report's summary has a line that says so."""
    lines = (line.strip().replace(".", "") for line in report.splitlines())
    return any(line.startswith(f"{name}:") and line.endswith("Pass") for line in lines)


if __name__ == "__main__":
    sys.exit(main())

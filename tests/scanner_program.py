"""Writes programs with trivy's command line that do as they are told: good scans, and every way of failing."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOUND = [
    {"VulnerabilityID": "CVE-1", "Severity": "LOW", "PkgName": "zlib", "InstalledVersion": "1"},
    {
        "VulnerabilityID": "CVE-2",
        "Severity": "CRITICAL",
        "Title": "Bad",
        "PkgName": "openssl",
        "InstalledVersion": "1.0",
        "FixedVersion": "1.1",
        "PrimaryURL": "https://cve.test/2",
    },
]
REPORT = {"SchemaVersion": 2, "Results": [{"Target": "one", "Vulnerabilities": FOUND}, {"Target": "other"}]}
SPDX = {"spdxVersion": "SPDX-2.3", "name": "image"}

_PROGRAM = """#!{python} -I
import json, os, sys, time
argv = sys.argv[1:]
cache = argv[argv.index("--cache-dir") + 1] if "--cache-dir" in argv else ""

def write(text):
    with open(argv[argv.index("--output") + 1], "w") as file:
        file.write(text)

def download():
    os.makedirs(cache + "/db", exist_ok=True)
    open(cache + "/db/metadata.json", "w").write("{{}}")

with open({calls!r}, "a") as file:
    file.write(json.dumps({{"argv": argv, "env": dict(os.environ), "cwd": os.getcwd(), "pid": os.getpid()}}) + "\\n")
    file.flush()
if argv[0] == "--version":
    print("Version: 1.2.3")
elif "--download-db-only" in argv:
    {download}
elif "--download-java-db-only" in argv:
    {java}
elif argv[0] == "image":
    {image}
elif argv[0] == "convert":
    {convert}
"""


@dataclass(frozen=True)
class Program:
    """A program, and where it writes down what it was asked."""

    path: Path
    log: Path

    @property
    def calls(self) -> list[dict[str, Any]]:
        """``argv``, ``env``, ``cwd`` and ``pid`` of every run but those for the version."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [call for line in lines if (call := json.loads(line))["argv"][0] != "--version"]


def write_program(
    folder: Path,
    *,
    download: str = "download()",
    java: str = "pass",
    image: str = "",
    convert: str = "",
    report: Any = REPORT,
) -> Program:
    """A program that runs those statements of Python; without them it does what trivy does when all is well."""
    folder.mkdir(parents=True, exist_ok=True)
    program = Program(folder / "trivy", folder / "calls")
    program.path.write_text(
        _PROGRAM.format(
            python=sys.executable,
            calls=str(program.log),
            download=download,
            java=java,
            image=image or f"write({json.dumps(report)!r})",
            convert=convert or f"write({json.dumps(SPDX)!r})",
        )
    )
    program.path.chmod(0o755)
    return program


def is_alive(pid: int) -> bool:
    """Whether a process runs: who has nobody to hear of its end stays as a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"

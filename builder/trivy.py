"""The program trivy: what it is asked, and what its answers and its failures mean."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import environ
from pathlib import Path

from builder.advisories import Advisories
from builder.child import Allowance, Child, find_program, run
from builder.failures import NOT_BUILT, BuildFailed
from builder.findings import MAX_REPORT_BYTES, read_document, read_findings
from builder.limits import Tail
from wave_proxy.image.scan import Vulnerability

_VERSION_S = 20.0
# What downloads go through; an image is looked at without any of it.
_WAY_OUT = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy", "SSL_CERT_FILE")
# As variables: not every command and version has all of these as options.
_QUIET = {"TRIVY_NO_PROGRESS": "true", "TRIVY_SKIP_VERSION_CHECK": "true", "TRIVY_DISABLE_TELEMETRY": "true"}
_NO_JAVA_INDEX = "--skip-java-db-update"
_CACHE = "[scan] cache"


class ScannerMissing(Exception):
    """This machine can't scan; the text names what is missing, and what to install or to set."""


@dataclass(frozen=True, slots=True)
class Report:
    """What was found in an image: its vulnerabilities, and its packages as an SPDX document (JSON).

    The document is empty when it would be too large.
    """

    found: Sequence[Vulnerability]
    spdx: bytes


class Trivy:
    """Runs trivy. ``program`` is its name or path, ``arguments`` are more ones of the operator's."""

    def __init__(
        self,
        program: str,
        advisories: Advisories,
        allowance: Allowance,
        *,
        severities: Sequence[str],
        arguments: Sequence[str] = (),
    ) -> None:
        self._program = program
        self._advisories = advisories
        self._allowance = allowance
        self._severities = severities
        self._arguments = arguments

    async def check(self) -> None:
        """Raises ScannerMissing when this machine can't run it."""
        try:
            async with asyncio.timeout(_VERSION_S):
                argv = [self._path(), "--version"]
                status = await run(Child("trivy", argv, Path("/"), lambda _: None, {}), self._allowance)
        except TimeoutError:
            raise ScannerMissing(f"{self._program} --version does not end") from None
        except (OSError, BuildFailed) as err:
            raise ScannerMissing(str(err)) from None
        if status != 0:
            raise ScannerMissing(f"{self._program} --version ended with exit status {status}")

    async def scan(self, layout: Path, say: Callable[[str], None], log: Callable[[bytes], None]) -> Report:
        """Look at the image in an OCI image layout; what is made stands beside that. Raises BuildFailed."""
        self._path()  # before anything else: nothing that follows would make sense
        tail = Tail(log)
        async with self._advisories.reading(lambda: self._renew(layout, log), say):
            status = await self._look(layout, tail)
        if status != 0 and _NO_JAVA_INDEX in tail.text and not self._advisories.offline:
            say("the image has Java archives: the index of these is fetched")
            await self._advisories.change(lambda: self._download("--download-java-db-only", layout, log))
            async with self._advisories.reading(lambda: self._renew(layout, log), say):
                status = await self._look(layout, tail)
        if status != 0:
            raise BuildFailed(_why(self._shown(tail.text, layout.parent), status), status)
        found = await asyncio.to_thread(read_findings, layout.parent / "report.json")
        return Report(found, await self._packages(layout, log))

    def places(self, folder: Path) -> dict[str, str]:
        """What stands for the places on this machine in what people read."""
        return {str(self._advisories.folder): _CACHE, str(folder): "."}

    def _shown(self, text: str, folder: Path) -> str:
        for place, shown in self.places(folder).items():
            text = text.replace(place, shown)
        return text

    async def _look(self, layout: Path, tail: Tail) -> int:
        options = ["--input", f"./{layout.name}", "--format", "json", "--output", "report.json"]
        options += ["--cache-backend", "memory", "--scanners", "vuln", "--severity", ",".join(self._severities)]
        options += ["--skip-db-update", _NO_JAVA_INDEX, "--offline-scan"]
        return await self._run("image", options, layout, tail.write)

    async def _renew(self, layout: Path, log: Callable[[bytes], None]) -> int:
        """Have the databases renewed that there are, if they are old; the exit status for that of vulnerabilities."""
        status = await self._download("--download-db-only", layout, log)
        if self._advisories.has_java_index:
            await self._download("--download-java-db-only", layout, log)  # else the old one has to do
        return status

    async def _download(self, option: str, layout: Path, log: Callable[[bytes], None]) -> int:
        way_out = {name: value for name in _WAY_OUT if (value := environ.get(name))}
        return await self._run("image", [option], layout, log, way_out)

    async def _packages(self, layout: Path, log: Callable[[bytes], None]) -> bytes:
        options = ["--format", "spdx-json", "--output", "spdx.json", "report.json"]
        status = await self._run("convert", options, layout, log)
        if status != 0:
            raise BuildFailed(f"the scanner has made no SPDX document (exit status {status}): see the log", status)
        file = layout.parent / "spdx.json"
        if file.is_file() and file.stat().st_size > MAX_REPORT_BYTES:
            return b""
        await asyncio.to_thread(read_document, file, "SPDX document")
        return await asyncio.to_thread(file.read_bytes)

    async def _run(
        self,
        command: str,
        options: Sequence[str],
        layout: Path,
        log: Callable[[bytes], None],
        environment: Mapping[str, str] | None = None,
    ) -> int:
        try:
            own = self._arguments if command == "image" else ()
            argv = [self._path(), command, *options, "--cache-dir", str(self._advisories.folder), *own]
            child = Child("the scanner", argv, layout.parent, log, {**_QUIET, **(environment or {})})
            return await run(child, self._allowance)
        except OSError as err:
            raise BuildFailed(f"the scanner can't be run on this builder: {err.strerror}", NOT_BUILT) from None

    def _path(self) -> str:
        """Raises BuildFailed."""
        path = find_program(self._program)
        if path is None:
            raise BuildFailed(
                f"nothing can be scanned on this builder: the program {self._program} is not installed, see "
                "[scan] program",
                NOT_BUILT,
            )
        return path


def _why(tail: str, status: int) -> str:
    """In one line why it failed, from the end of its log."""
    if _NO_JAVA_INDEX in tail:
        return (
            "no index of Java archives, which the image has: let the builder download it, or put one into [scan] cache"
        )
    lines = [line for line in tail.splitlines() if "FATAL" in line] or tail.splitlines()[-1:]
    said = " ".join(lines[-1].partition("FATAL")[2].split() or lines[-1].split()) if lines else ""
    return f"the scanner ended with exit status {status}{': ' if said else ''}{said[:300]}"

"""The program trivy, played by one of our own in every way of failing; the real one is in test_scanner_real.py."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from builder.advisories import Advisories
from builder.child import Allowance
from builder.failures import BuildFailed
from builder.trivy import Report, ScannerMissing, Trivy
from tests.patience import eventually, patience
from tests.scanner_program import FOUND, Program, write_program

ALLOWANCE = Allowance(1 << 30, 1 << 30, 1 << 20)


class Scene:
    """A workspace with a layout in it, which the program is said to scan."""

    def __init__(self, folder: Path) -> None:
        self.cache = folder / "cache"
        self.layout = folder / "work" / "image"
        self.layout.mkdir(parents=True)
        self.said: list[str] = []
        self.logged: list[bytes] = []

    def trivy(self, program: Program | str, *, offline: bool = False, **options: Any) -> Trivy:
        path = str(program.path) if isinstance(program, Program) else program
        advisories = Advisories(self.cache, offline=offline)
        return Trivy(path, advisories, ALLOWANCE, severities=("HIGH", "CRITICAL"), **options)

    async def scan(self, trivy: Trivy) -> Report:
        async with patience():
            return await trivy.scan(self.layout, self.said.append, self.logged.append)

    async def fail(self, trivy: Trivy) -> str:
        with pytest.raises(BuildFailed) as caught:
            await self.scan(trivy)
        assert caught.value.exit_status != 0
        return str(caught.value)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


async def test_a_scan(scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.test")
    program = write_program(tmp_path / "bin")
    report = await scene.scan(scene.trivy(program, arguments=("--db-repository", "registry.test/db")))
    assert [one.id for one in report.found] == [found["VulnerabilityID"] for found in FOUND]
    assert report.spdx == b'{"spdxVersion": "SPDX-2.3", "name": "image"}'
    download, image, convert = program.calls
    assert download["argv"][:2] == ["image", "--download-db-only"]
    assert download["env"]["HTTPS_PROXY"] == "http://proxy.test"
    assert image["argv"][:7] == ["image", "--input", "./image", "--format", "json", "--output", "report.json"]
    assert {"--skip-db-update", "--offline-scan", "--db-repository"} <= set(image["argv"])
    assert image["argv"][image["argv"].index("--severity") + 1] == "HIGH,CRITICAL"
    assert image["cwd"] == str(scene.layout.parent)
    assert "HTTPS_PROXY" not in image["env"]
    assert convert["argv"][0] == "convert"
    assert "--db-repository" not in convert["argv"]
    assert {call["argv"][call["argv"].index("--cache-dir") + 1] for call in program.calls} == {str(scene.cache)}


@pytest.mark.parametrize(
    ("play", "message"),
    [
        pytest.param({"image": "sys.exit(1)"}, "the scanner ended with exit status 1", id="exit 1"),
        pytest.param(
            {"image": "print('INFO x'); print('2026 FATAL  Fatal error  scan error: ' + cache); sys.exit(1)"},
            "the scanner ended with exit status 1: Fatal error scan error: [scan] cache",
            id="fatal",
        ),
        pytest.param({"image": "os.kill(os.getpid(), 9)"}, "the scanner ended with exit status 137", id="killed"),
        pytest.param({"image": "pass"}, "the scanner has ended well, and left no report: ", id="no report"),
        pytest.param({"image": "write('garbage')"}, "the scanner's report is not JSON: ", id="garbage"),
        pytest.param(
            {"image": "write('{'); print('x' * (2 << 20))"},
            "the scanner wrote more than 1.0 MB into the log",
            id="huge output",
        ),
        pytest.param(
            {"convert": "sys.exit(2)"}, "the scanner has made no SPDX document (exit status 2)", id="no packages"
        ),
        pytest.param({"convert": "pass"}, "the scanner has ended well, and left no SPDX document: ", id="no spdx"),
        pytest.param({"convert": "write('x')"}, "the scanner's SPDX document is not JSON: ", id="spdx is garbage"),
        pytest.param(
            {"download": "print('FATAL', cache); sys.exit(1)"},
            "no vulnerability database: it can't be downloaded",
            id="no database",
        ),
        pytest.param(
            {"download": "pass"}, "no vulnerability database: it can't be downloaded", id="download without one"
        ),
    ],
)
async def test_a_scan_fails(scene: Scene, tmp_path: Path, play: dict[str, str], message: str) -> None:
    assert (await scene.fail(scene.trivy(write_program(tmp_path / "bin", **play)))).startswith(message)


async def test_an_unknown_program(scene: Scene) -> None:
    trivy = scene.trivy("no-such-scanner")
    message = "the program no-such-scanner is not installed, see [scan] program"
    assert await scene.fail(trivy) == f"nothing can be scanned on this builder: {message}"
    with pytest.raises(ScannerMissing, match=r"no-such-scanner is not installed"):
        await trivy.check()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("#!/bin/sh\nexit 3\n", r"ended with exit status 3"),
        ("#!/bin/sh\nsleep 600\n", r"does not end"),
        ("#!/no/such/interpreter\n", r"No such file|exit status 127"),
    ],
    ids=["fails", "hangs", "can't be run"],
)
async def test_a_program_that_is_not_fit(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    if "sleep" in text:
        monkeypatch.setattr("builder.trivy._VERSION_S", 0.5)
    (tmp_path / "trivy").write_text(text)
    (tmp_path / "trivy").chmod(0o755)
    with pytest.raises(ScannerMissing, match=message):
        await scene.trivy(str(tmp_path / "trivy")).check()


async def test_a_program_that_is(scene: Scene, tmp_path: Path) -> None:
    await scene.trivy(write_program(tmp_path / "bin")).check()


async def test_an_endless_scan_is_ended(scene: Scene, tmp_path: Path) -> None:
    program = write_program(tmp_path / "bin", image="time.sleep(600)")
    running = asyncio.create_task(scene.scan(scene.trivy(program)))
    await eventually(lambda: len(program.calls) >= 2)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert not Path(f"/proc/{program.calls[-1]['pid']}").exists()


# --- databases -------------------------------------------------------------------------------------------------------

NO_INDEX = "print(\"Java DB update failed: '--skip-java-db-update' cannot be specified on the first run\"); sys.exit(1)"


async def test_the_index_of_java_archives_is_fetched_when_an_image_has_some(scene: Scene, tmp_path: Path) -> None:
    good = "write('{\"SchemaVersion\": 2}')"
    image = f"exec({good!r}) if os.path.exists(cache + '/java-db') else exec({NO_INDEX!r})"
    java = "os.makedirs(cache + '/java-db', exist_ok=True); open(cache + '/java-db/metadata.json', 'w').close()"
    program = write_program(tmp_path / "bin", image=image, java=java)
    trivy = scene.trivy(program)
    assert (await scene.scan(trivy)).found == []
    assert (await scene.scan(trivy)).found == []
    assert downloads(program) == ["--download-db-only", "--download-java-db-only"]
    assert (await scene.scan(scene.trivy(program))).found == []  # as later on, or in another process
    assert downloads(program)[2:] == ["--download-db-only", "--download-java-db-only"]


def downloads(program: Program) -> list[str]:
    return [call["argv"][1] for call in program.calls if "--download" in call["argv"][1]]


async def test_the_index_of_java_archives_can_not_be_had(scene: Scene, tmp_path: Path) -> None:
    program = write_program(tmp_path / "bin", image=NO_INDEX, java="sys.exit(1)")
    assert (await scene.fail(scene.trivy(program))).startswith("no index of Java archives, which the image has")


async def test_without_downloads_the_operator_brings_the_database(scene: Scene, tmp_path: Path) -> None:
    program = write_program(tmp_path / "bin")
    trivy = scene.trivy(program, offline=True)
    assert (await scene.fail(trivy)).startswith("no vulnerability database: [scan] offline is set")
    (scene.cache / "db").mkdir(parents=True)
    (scene.cache / "db" / "metadata.json").write_text("{}")
    await scene.scan(trivy)
    assert [call["argv"][0] for call in program.calls] == ["image", "convert"]
    no_index = write_program(tmp_path / "other", image=NO_INDEX)
    assert (await scene.fail(scene.trivy(no_index, offline=True))).startswith("no index of Java archives")
    assert len(no_index.calls) == 1


async def test_an_old_database_has_to_do_when_there_is_no_newer_one(scene: Scene, tmp_path: Path) -> None:
    program = write_program(tmp_path / "bin", download="sys.exit(1)")
    (scene.cache / "db").mkdir(parents=True)
    (scene.cache / "db" / "metadata.json").write_text("{}")
    await scene.scan(scene.trivy(program))
    assert scene.said == ["the vulnerability database can't be renewed: what there is has to do"]


async def test_one_renews_the_database_for_all(scene: Scene, tmp_path: Path) -> None:
    program = write_program(tmp_path / "bin", download="time.sleep(0.2); download()")
    one, other = scene.trivy(program), scene.trivy(program)
    layouts = [tmp_path / str(number) / "image" for number in range(4)]
    for layout in layouts:
        layout.mkdir(parents=True)
    scans = [trivy.scan(layout, print, print) for layout in layouts for trivy in (one,)]
    await asyncio.gather(*scans, other.scan(scene.layout, print, print))
    assert len(downloads(program)) == 2  # one for each process


async def test_nobody_renews_what_is_being_read(scene: Scene, tmp_path: Path) -> None:
    image = "open('began', 'w').close()\n    time.sleep(0.5); write('{\"SchemaVersion\": 2}')"
    program = write_program(tmp_path / "bin", image=image)
    reader = asyncio.create_task(scene.scan(scene.trivy(program)))
    await eventually((scene.layout.parent / "began").exists)
    other = tmp_path / "other" / "image"
    other.mkdir(parents=True)
    await scene.trivy(program).scan(other, print, print)
    await reader
    kinds = [call["argv"][1] for call in program.calls if call["argv"][0] == "image"]
    assert kinds == ["--download-db-only", "--input", "--download-db-only", "--input"]


async def test_a_document_that_is_too_large_is_left_out(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builder.trivy.MAX_REPORT_BYTES", 100)
    report = await scene.scan(scene.trivy(write_program(tmp_path / "bin", convert="write('x' * 101)")))
    assert (len(report.found), report.spdx) == (2, b"")

"""Programs that work for a job: what they see, what they may take, and that nothing of them is left."""

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from builder.child import Allowance, Child, find_program, run
from builder.failures import BuildFailed
from tests.patience import eventually, patience
from tests.scanner_program import is_alive

MUCH = Allowance(memory=1 << 30, disk=1 << 30, output=1 << 20)


async def run_python(folder: Path, text: str, allowance: Allowance = MUCH, **environment: str) -> tuple[int, str]:
    """The exit status of a program, and what it wrote."""
    said: list[bytes] = []
    child = Child("the program", [sys.executable, "-I", "-c", text], folder, said.append, environment)
    return await run(child, allowance), b"".join(said).decode()


async def test_it_has_nothing_of_our_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WAVE_REDIS_URL", "redis://secret")
    text = "import os; print(sorted(os.environ), os.getcwd(), os.environ['HOME'])"
    status, said = await run_python(tmp_path, text, LC_ALL="C.UTF-8")
    assert status == 0
    assert said == f"['HOME', 'LC_ALL', 'PATH', 'TMPDIR'] {tmp_path} {tmp_path}\n"


async def test_its_exit_status_and_both_of_its_outputs(tmp_path: Path) -> None:
    text = "import sys; print('out', flush=True); print('err', file=sys.stderr); sys.exit(7)"
    assert await run_python(tmp_path, text) == (7, "out\nerr\n")
    status, _ = await run_python(tmp_path, "import os; os.kill(os.getpid(), 15)")
    assert status == 128 + 15


@pytest.mark.parametrize(
    ("text", "allowance", "message"),
    [
        pytest.param(
            "x = bytearray(200 << 20); import time; time.sleep(600)",
            Allowance(100 << 20, 1 << 30, 1 << 20),
            "out of memory: the program used its limit of 104.9 MB; raise [build] memory",
            id="memory",
        ),
        pytest.param(
            "while True: print('x' * 1000)",
            Allowance(1 << 30, 1 << 30, 100_000),
            "the program wrote more than 100.0 kB into the log",
            id="output",
        ),
        pytest.param(
            "for n in range(40): open(str(n), 'wb').write(bytes(1 << 20))\nimport time; time.sleep(600)",
            Allowance(1 << 30, 10 << 20, 1 << 20),
            "no space: the program used its limit of 10.5 MB of disk; raise [build] disk",
            id="disk",
        ),
    ],
)
async def test_it_takes_too_much(tmp_path: Path, text: str, allowance: Allowance, message: str) -> None:
    async with patience():
        with pytest.raises(BuildFailed) as caught:
            await run_python(tmp_path, text, allowance)
    assert str(caught.value) == message


async def test_a_file_is_never_larger_than_all_may_be(tmp_path: Path) -> None:
    text = "import time; time.sleep(0.2); open('file', 'wb').write(bytes(2 << 20))"
    status, said = await run_python(tmp_path, text, Allowance(1 << 30, 1 << 20, 1 << 20))
    assert (status, "File too large" in said) == (1, True)


async def test_nothing_is_left_when_it_is_cancelled(tmp_path: Path) -> None:
    text = (
        "import os, time\nchild = os.fork()\n"
        "open('pid' if child else 'child', 'w').write(str(os.getpid()))\ntime.sleep(600)"
    )
    running = asyncio.create_task(run_python(tmp_path, text))
    pids = [await _read_pid(tmp_path / name) for name in ("pid", "child")]
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await eventually(lambda: not any(is_alive(pid) for pid in pids))


@pytest.mark.skipif(find_program("setpriv") is None, reason="setpriv (util-linux) is not installed")
async def test_it_ends_with_the_builder(tmp_path: Path) -> None:
    text = f"""
import asyncio, sys
from pathlib import Path
from builder.child import Allowance, Child, run
child = Child("x", ["sh", "-c", "echo $$ >pid; exec sleep 600"], Path({str(tmp_path)!r}), print, {{}})
asyncio.run(run(child, Allowance(1 << 30, 1 << 30, 1 << 20)))
"""
    builder = await asyncio.create_subprocess_exec(sys.executable, "-c", text, cwd=Path(__file__).parent.parent)
    pid = await _read_pid(tmp_path / "pid")
    builder.kill()
    await builder.wait()
    await eventually(lambda: not is_alive(pid))


async def test_a_program_that_is_none(tmp_path: Path) -> None:
    child = Child("x", [str(tmp_path / "none")], tmp_path, lambda _: None, {})
    try:
        status = await run(child, MUCH)
    except FileNotFoundError:
        status = 127  # without setpriv in between
    assert status == 127


async def _read_pid(file: Path) -> int:
    return int(await eventually(lambda: file.exists() and file.read_text()))


def test_how_programs_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found: Any = find_program("sh")
    assert os.access(found, os.X_OK)
    assert find_program("no-such-program") is None
    (tmp_path / "mine").write_text("#!/bin/sh\n")
    (tmp_path / "mine").chmod(0o755)
    assert find_program(str(tmp_path / "mine")) == str(tmp_path / "mine")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_program("mine") == str(tmp_path / "mine")

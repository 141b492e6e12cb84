"""Boxes: what is in one, that nothing gets out or survives, and that limits end it."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from textwrap import dedent
from time import sleep
from uuid import uuid4

import pytest

import builder.box
import builder.limits
from builder.box import BoxUnavailable
from builder.failures import OUT_OF_MEMORY, BuildFailed
from tests.boxes import LIMITS, processes_with, run_in_box, until_gone, until_there, why_no_box
from tests.patience import eventually

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(bool(why_no_box()), reason=f"no boxes here: {why_no_box()}")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can set this up")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "work"
    path.mkdir(mode=0o700)
    return path


def mark() -> str:
    """The number of seconds to sleep by which a process can be found."""
    return f"{1000 + uuid4().int % 10**6}.{uuid4().int % 10**9}"


# --- what is in it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "status", "said"),
    [
        ("echo out; echo error >&2", 0, "out\nerror\n"),
        ("exit 7", 7, ""),
        ("kill -9 $$", 137, ""),
        ("kill $$", 143, ""),
        ("id -u; hostname; pwd", 0, "0\nbuild\n/build\n"),
        ("cat", 0, ""),
        ("sleep 0.05 & sleep 0.1; wait; echo end", 0, "end\n"),
    ],
)
async def test_a_program_runs_and_its_output_and_status_come_back(
    folder: Path, script: str, status: int, said: str
) -> None:
    assert await run_in_box(folder, script) == (status, said)


async def test_only_the_system_and_the_folder_can_be_seen(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("nobody's business")
    (folder / "file").write_text("of the build\n")
    status, said = await run_in_box(folder, f"cat file; ls /build; cat {tmp_path}/secret; ls /home /work /opt /srv")
    assert status != 0
    assert said.startswith("of the build\nfile\n")
    assert "nobody's business" not in said
    assert said.count("No such file") == 5


async def test_nothing_but_the_folder_can_be_changed(folder: Path) -> None:
    _, said = await run_in_box(
        folder, "touch /usr/x /etc/ssl/x; mount -o remount,rw,bind /usr && touch /usr/x; ls /usr/x"
    )
    assert said.count("Read-only file system") + said.count("Permission denied") >= 2
    assert not Path("/usr/x").exists()
    assert not Path("/etc/ssl/x").exists()


async def test_the_environment_is_none_of_the_builders(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WAVE_BUILD__SECRET", "xyzzy")
    _, said = await run_in_box(folder, "env; cat /proc/1/environ | tr '\\0' '\\n'")
    assert "xyzzy" not in said
    assert "http_proxy=http://127.0.0.1:3128" in said


async def test_processes_of_the_machine_can_not_be_seen_or_killed(folder: Path) -> None:
    with subprocess.Popen(["sleep", mark()]) as other:
        try:
            _, said = await run_in_box(folder, f"ls -d /proc/[0-9]*; kill -9 {other.pid}; kill -9 -1; echo alive")
            assert other.poll() is None
        finally:
            other.kill()
    assert set(said.split()) & {"/proc/1", "/proc/2"} == {"/proc/1", "/proc/2"}
    assert len([word for word in said.split() if word.startswith("/proc/")]) <= 4
    assert "No such process" in said


async def test_there_is_no_network_but_loopback(folder: Path) -> None:
    _, said = await run_in_box(folder, "cat /proc/net/dev")
    assert _interfaces(said) == ["lo"]


async def test_the_network_of_the_machine_when_asked_for(folder: Path) -> None:
    _, said = await run_in_box(folder, "cat /proc/net/dev; env", isolated=False)
    assert _interfaces(said) == _interfaces(Path("/proc/net/dev").read_text())
    assert "http_proxy" not in said


def _interfaces(text: str) -> list[str]:
    """The names in /proc/net/dev."""
    return [line.partition(":")[0].strip() for line in text.splitlines() if ":" in line and "=" not in line]


@as_root
async def test_root_in_a_box_is_nobody_outside(folder: Path) -> None:
    (folder / "given").write_text("x")
    _, said = await run_in_box(
        folder, "cat /proc/self/uid_map; stat -c %u given; touch made; chown 5:6 made; mknod d b 8 0"
    )
    if said.split()[:3] == ["0", "0", "4294967295"]:
        pytest.skip("this machine has no user namespaces")
    assert said.split()[:4] == ["0", "100000", "65536", "0"]
    assert "mknod" in said, "a device could be made"
    assert (folder / "made").stat().st_uid == 100_005
    assert (folder / "made").stat().st_gid == 100_006


async def test_a_program_that_is_not_there_is_named(folder: Path) -> None:
    boxes = builder.box.Boxes(LIMITS, None)
    meter = builder.limits.Meter(lambda _: None, 1000)
    with pytest.raises(BoxUnavailable, match="nosuch-program: No such file"):
        await boxes.run(builder.box.Run(("nosuch-program",), folder, meter, {}))


# --- its end -----------------------------------------------------------------------------------------------------


async def test_all_in_a_box_ends_with_its_program(folder: Path) -> None:
    name = mark()
    script = f"setsid sleep {name} >/dev/null 2>&1 & (sleep {name} &) ; sleep {name} & true"
    assert await run_in_box(folder, script) == (0, "")
    assert processes_with(name) == []


async def test_all_in_a_box_ends_with_its_task(folder: Path) -> None:
    name = mark()
    task = asyncio.create_task(run_in_box(folder, f"trap '' TERM INT HUP; setsid sleep {name} & sleep {name}"))
    await until_there(f"sleep {name}")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert processes_with(name) == []


@pytest.mark.parametrize("delay_s", [0.0, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, None])
async def test_all_in_a_box_ends_with_a_builder_that_is_killed(folder: Path, delay_s: float | None) -> None:
    name = mark()
    code = f"""
        import asyncio, pathlib, sys
        from tests.boxes import run_in_box
        print("ready", flush=True)
        asyncio.run(run_in_box(pathlib.Path({str(folder)!r}), "trap '' TERM; setsid sleep {name} & sleep {name}"))
    """
    with subprocess.Popen([sys.executable, "-c", dedent(code)], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        if delay_s is None:
            await until_there(f"sleep {name}")
        else:
            sleep(delay_s)
        children = _children(process.pid)
        process.kill()
    await until_gone(name)
    await eventually(
        lambda: not any(Path(f"/proc/{child}").exists() for child in children),
        "the box's first process is still there",
    )


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


# --- limits ------------------------------------------------------------------------------------------------------

SHARING = "import mmap, time; held = mmap.mmap(-1, 400 << 20); held.write(bytes(400 << 20)); time.sleep(1000)"
BOMB = "bomb() { bomb | bomb & }; bomb; sleep 1000"


@pytest.fixture(params=["cgroup", "watchdog"])
def guarded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a cgroup where this machine lets us make one, and without."""
    if request.param == "watchdog":
        monkeypatch.setattr(builder.box, "find_parents", lambda: ())


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        pytest.param(BOMB, "too many processes: the build reached its limit of 100 processes", id="bomb"),
        pytest.param(
            "dd if=/dev/zero of=/dev/null bs=900M count=1000",
            "out of memory: the build used its limit of 300.0 MB",
            id="memory",
        ),
        pytest.param(
            "mkdir 'a b'; mount -t tmpfs t 'a b'; dd if=/dev/zero of='a b/file' bs=1M count=400; sleep 1000",
            "out of memory: the build used its limit of 300.0 MB",
            id="files in memory",
        ),
        pytest.param(
            f"python3 -c '{SHARING}'",
            "out of memory: the build used its limit of 300.0 MB",
            id="shared memory",
        ),
    ],
)
async def test_a_box_that_takes_too_much_is_ended(folder: Path, script: str, reason: str) -> None:
    limits = replace(LIMITS, memory=300 * 10**6, processes=100)
    with pytest.raises(BuildFailed) as caught:
        await run_in_box(folder, script, limits=limits)
    assert caught.value.reason.startswith(reason)
    assert caught.value.exit_status == (OUT_OF_MEMORY if "memory" in reason else 1)
    assert processes_with("dd if=/dev/zero of=/dev/null bs=900M") == []


@pytest.mark.parametrize("command", ["yes", "yes >&2", "cat /dev/zero", "while :; do echo line; done"])
async def test_a_log_that_is_too_large_ends_the_box(folder: Path, command: str) -> None:
    with pytest.raises(BuildFailed, match=r"^log too large: the build wrote more than its limit of 1\.0 MB"):
        await run_in_box(folder, command)


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(
            "for i in 1 2 3 4 5 6 7 8 9; do dd if=/dev/zero of=f$i bs=1M count=20; done; sleep 1000", id="files"
        ),
        pytest.param(
            "mkdir -m 0 d; chmod 700 d; dd if=/dev/zero of=d/f bs=1M count=90; ln d/f g; cp g h; sleep 1000",
            id="hidden",
        ),
    ],
)
async def test_too_much_disk_ends_the_box(folder: Path, script: str) -> None:
    with pytest.raises(BuildFailed, match=r"^no space: the build used more than its limit of 100\.0 MB of disk"):
        await run_in_box(folder, script, limits=replace(LIMITS, disk=100 * 10**6))


async def test_one_huge_file_fails_at_the_limit(folder: Path) -> None:
    status, said = await run_in_box(
        folder, "dd if=/dev/zero of=f bs=1M count=500", limits=replace(LIMITS, disk=50 * 10**6)
    )
    assert status == 128 + signal.SIGXFSZ or "File too large" in said
    assert (folder / "f").stat().st_size <= 50 * 10**6


async def test_a_full_disk_ends_the_box(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder.limits, "_MIN_FREE_BYTES", 1 << 60)
    with pytest.raises(BuildFailed, match=r"^no space: the builder's disk has only .* left"):
        await run_in_box(folder, "sleep 1000")


async def test_a_disk_with_as_many_files_as_it_can_have_ends_the_box(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not os.statvfs(folder).f_files:
        pytest.skip("this file system has no limit on files")
    monkeypatch.setattr(builder.limits, "_MIN_FREE_FILES", 1.1)
    with pytest.raises(BuildFailed, match=r"^no space: the builder's disk can have only .*% of its files more"):
        await run_in_box(folder, "sleep 1000")


async def test_files_that_were_removed_again_do_not_count(folder: Path) -> None:
    script = "for i in 1 2 3 4 5 6; do dd if=/dev/zero of=f bs=1M count=60 2>/dev/null; rm f; sleep 0.2; done"
    assert await run_in_box(folder, script, limits=replace(LIMITS, disk=100 * 10**6)) == (0, "")


# --- other machines ----------------------------------------------------------------------------------------------

_RUN_ONE = """
import asyncio, os, pathlib, sys
from tests.boxes import run_in_box
print(*asyncio.run(run_in_box(pathlib.Path(sys.argv[1]), "id -u; touch made; ls; wc -l < /proc/net/dev")))
"""


@as_root
def test_without_user_namespaces_a_box_has_the_rest_and_says_so(folder: Path) -> None:
    script = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    nested = ["unshare", "--user", "--map-root-user"]
    nested += ["sh", "-c", script, "sh", sys.executable, "-c", _RUN_ONE, str(folder)]
    ran = subprocess.run(nested, cwd=ROOT, capture_output=True, text=True, check=False)
    if "max_user_namespaces" in ran.stderr or "unshare" in ran.stderr:
        pytest.skip(f"this machine can't be asked for fewer namespaces: {ran.stderr}")
    assert "0 0\nmade\n3" in ran.stdout, ran.stderr
    assert ran.stdout.count("this machine gives us no user namespaces") == 1
    assert (folder / "made").stat().st_uid == 0


DAEMON = 1  # a user that every machine has: newuidmap wants one with a name


@as_root
@pytest.mark.parametrize("with_ids", [True, False])
def test_a_user_with_ids_of_their_own_needs_no_root(with_ids: bool) -> None:
    home = Path(mkdtemp(dir="/tmp"))
    try:
        given = "daemon:700000:65536\n" if with_ids else ""
        for name in ("subuid", "subgid"):
            (home / name).write_text(given)
        (home / "work").mkdir()
        for path in (home, home / "work"):
            os.chown(path, DAEMON, DAEMON)
        script = f"mount --bind {home}/subuid /etc/subuid && mount --bind {home}/subgid /etc/subgid && exec " + (
            "setpriv --reuid daemon --regid daemon --clear-groups --inh-caps +dac_read_search "
            '--ambient-caps +dac_read_search "$@"'  # the interpreter may be in a folder of root's
        )
        command = ["unshare", "--mount", "sh", "-c", script, "sh", sys.executable, "-c", _RUN_ONE, str(home / "work")]
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if "newuidmap" in ran.stderr and shutil.which("newuidmap") is None:
            pytest.skip("the package uidmap is not installed")
        if "can't open file" in ran.stderr or "Permission denied: '/" in ran.stderr or ran.returncode == 127:
            pytest.skip(f"another user can't run this Python: {ran.stderr}")
        if with_ids:
            assert "0 0\nmade\n3" in ran.stdout, ran.stderr
            assert (home / "work" / "made").stat().st_uid == DAEMON
        else:
            assert "add the line daemon:100000:65536 as root" in ran.stderr
    finally:
        shutil.rmtree(home)

"""Where cgroups may be made, and what they count: on folders that look like the kernel's, and on the kernel's own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from builder.cgroup import Cgroup, Parent, find_parents, remove_leftovers
from builder.limits import Limits, disk_usage, exceeded, stored_bytes, usage


class Kernel:
    """A folder with ``/proc/self`` and a cgroup file system."""

    def __init__(self, tmp: Path) -> None:
        self.proc = tmp / "proc"
        self.root = tmp / "cgroup"
        self.mounts: list[str] = []
        self.memberships: list[str] = []
        (self.proc / "self").mkdir(parents=True)
        self.root.mkdir()

    def mount_v2(self, own: str, subtree: str) -> Path:
        """The version 2 hierarchy; gives our own folder."""
        self.mounts.append(f"cgroup2 {self.root} cgroup2 rw 0 0")
        self.memberships.append(f"0::{own}")
        folder = Path(f"{self.root}{own}")
        folder.mkdir(parents=True, exist_ok=True)
        for each in (folder, folder.parent):
            (each / "cgroup.subtree_control").write_text(subtree)
        return folder

    def mount_v1(self, controller: str, own: str) -> Path:
        """An old hierarchy; gives our own folder in it."""
        self.mounts.append(f"cgroup {self.root}/{controller} cgroup rw,relatime,{controller} 0 0")
        self.memberships.append(f"{len(self.mounts)}:{controller}:{own}")
        folder = Path(f"{self.root}/{controller}{own}")
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def parents(self) -> tuple[Parent, ...]:
        (self.proc / "self" / "mounts").write_text("proc /proc proc rw 0 0\n" + "\n".join(self.mounts) + "\n")
        (self.proc / "self" / "cgroup").write_text("1:name=systemd:/x\n" + "\n".join(self.memberships) + "\n")
        return find_parents(self.proc)


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    return Kernel(tmp_path)


def delegate(folder: Path) -> None:
    try:
        os.setxattr(folder, "user.delegate", b"1")
    except OSError as err:
        pytest.skip(f"no attributes of files here: {err}")


# --- where -------------------------------------------------------------------------------------------------------


def test_the_root_that_we_see_is_ours(kernel: Kernel) -> None:
    folder = kernel.mount_v2("/", "cpu memory pids")
    (parent,) = kernel.parents()
    assert parent.folder == folder
    assert [controller.kind for controller in parent.controllers] == ["memory", "processes"]


def test_a_cgroup_of_a_manager_is_not_ours(kernel: Kernel) -> None:
    kernel.mount_v2("/system.slice/x.service", "memory pids")
    kernel.mount_v1("memory", "/user.slice")
    assert kernel.parents() == ()


def test_a_cgroup_that_was_delegated_is_ours(kernel: Kernel) -> None:
    folder = kernel.mount_v2("/system.slice/x.service", "")
    delegate(folder)
    (parent,) = kernel.parents()
    assert parent.folder == folder
    assert (folder / "cgroup.subtree_control").read_text() == "+memory +pids"


def test_a_subgroup_of_a_delegated_cgroup_makes_its_siblings(kernel: Kernel) -> None:
    folder = kernel.mount_v2("/system.slice/x.service/main", "memory pids")
    delegate(folder.parent)
    (parent,) = kernel.parents()
    assert parent.folder == folder.parent


def test_old_hierarchies_are_used_each_where_it_is_ours(kernel: Kernel) -> None:
    kernel.mount_v1("memory", "/someone/elses")
    pids = kernel.mount_v1("pids", "/")
    kernel.mount_v1("cpu", "/")
    (parent,) = kernel.parents()
    assert parent.folder == pids
    assert [controller.kind for controller in parent.controllers] == ["processes"]


async def test_what_killed_builders_left_is_removed_and_nothing_else(kernel: Kernel) -> None:
    folder = kernel.mount_v2("/", "memory pids")
    names = ("999999999-1", f"{os.getpid()}-2", "999999998-3")
    gone, alive, full = (folder / f"wave-proxy-build-{name}" for name in names)
    other = folder / "another"
    for each in (gone, alive, full, other):
        each.mkdir()
    (full / "process").touch()
    await remove_leftovers(kernel.parents())
    assert [each.exists() for each in (gone, alive, full, other)] == [False, True, True, True]


# --- what it does ------------------------------------------------------------------------------------------------


async def test_limits_are_written_and_counters_read(kernel: Kernel) -> None:
    kernel.mount_v2("/", "memory pids")
    cgroup = Cgroup.create(kernel.parents(), "7", {"memory": 10**9, "processes": 100})
    (folder,) = cgroup.folders
    assert folder.name == f"wave-proxy-build-{os.getpid()}-7"
    assert cgroup.limited == {"memory", "processes"}
    assert {name: (folder / name).read_text() for name in ("memory.max", "memory.swap.max", "pids.max")} == {
        "memory.max": "1000000000",
        "memory.swap.max": "0",
        "pids.max": "100",
    }
    assert cgroup.reached() is None
    (folder / "pids.events").write_text("max 0\n")
    (folder / "memory.events").write_text("low 0\nhigh 0\nmax 9\noom 1\noom_kill 0\n")
    assert cgroup.reached() is None
    (folder / "memory.events").write_text("low 0\nhigh 0\nmax 9\noom 1\noom_kill 2\n")
    assert cgroup.reached() == "memory"
    (folder / "memory.events").unlink()
    (folder / "pids.events").write_text("max 3\n")
    assert cgroup.reached() == "processes"


async def test_a_killed_process_counts_in_an_old_hierarchy(kernel: Kernel) -> None:
    kernel.mount_v1("memory", "/")
    cgroup = Cgroup.create(kernel.parents(), "7", {"memory": 10**9, "processes": 100})
    (folder,) = cgroup.folders
    assert (folder / "memory.limit_in_bytes").read_text() == "1000000000"
    assert cgroup.limited == {"memory"}
    (folder / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 1\n")
    assert cgroup.reached() == "memory"


async def test_a_cgroup_of_this_machine_comes_and_goes() -> None:
    parents = find_parents()
    if not parents:
        pytest.skip("no cgroup of this machine is ours")
    cgroup = Cgroup.create(parents, "test", {"memory": 10**9, "processes": 100})
    assert len(cgroup.folders) == len(parents)
    with subprocess.Popen(["sleep", "100"]) as process:
        cgroup.add(process.pid)
        held = [str(process.pid) in (folder / "cgroup.procs").read_text().split() for folder in cgroup.folders]
        process.kill()
    await cgroup.remove()
    assert all(held)
    assert not any(folder.exists() for folder in cgroup.folders)


# --- the watchdog's figures --------------------------------------------------------------------------------------


def test_what_a_family_uses_is_counted_whole() -> None:
    script = "import subprocess, sys; x = b'x' * 50_000_000; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    inner = "x = b'x' * 60_000_000; import sys; print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", script, inner], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        used = usage(process.pid)
        process.communicate()
    assert used.processes == 2
    assert 110_000_000 < used.memory < 160_000_000


def test_files_with_nothing_in_them_take_up_the_disk(tmp_path: Path) -> None:
    for number in range(100):
        (tmp_path / str(number)).touch()
    assert disk_usage(tmp_path) >= 400_000


def test_a_disk_in_the_place_of_a_memory_file_system_is_not_memory(tmp_path: Path) -> None:
    """A process may have changed its root since its mounts were read."""
    status = tmp_path.stat()
    device = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}".encode()
    assert stored_bytes(device, bytes(tmp_path)) > 0
    assert stored_bytes(b"0:999999", bytes(tmp_path)) == 0


def test_limits_are_said_as_people_read_them() -> None:
    limits = Limits(memory=4 * 10**9, processes=2048, disk=1, log_bytes=1)
    assert exceeded("memory", limits).reason.startswith("out of memory: the build used its limit of 4.0 GB; ")
    assert "limit of 2048 processes and threads" in exceeded("processes", limits).reason

"""The first program of a box: makes the namespaces around itself, then runs the one that it was asked for in them.

It is started as a file of its own (``python -I inside.py <fd>``), needs the standard library alone, and talks over a
socket with the builder (``box.py``), message by message:

    builder  what to run, as JSON (see box._Plan)
    box      "unshared" with a user namespace whose ids are to be mapped, "plain" without one, or "failed <errno> <why>"
    builder  "mapped"
    box      "listening", with the sockets that listen in the box's network
    builder  "go"
    box      "failed <errno> <why>" if it can't be run

There are two processes. The outer one stays in the builder's pid namespace: SIGTERM to it ends the box, and it ends
when all in the box has ended, with the exit status of the program. The inner one is pid 1 in the box. Each asks the
kernel to be killed with its parent, so that nothing outlives the builder.
"""

import ctypes
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
from collections.abc import Sequence
from contextlib import suppress
from fcntl import ioctl
from types import FrameType
from typing import Any, NoReturn

_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
_CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT, _MS_BIND = 1, 2, 4, 8, 32, 4096
_MS_REC, _MS_PRIVATE, _MNT_DETACH = 16384, 1 << 18, 2
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "ppc64le": 203, "s390x": 217, "riscv64": 41}
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
_MESSAGE_BYTES = 1 << 16
# Folders that every machine has: what is mounted over them is seen in the box alone, and they are not in its root.
_WORKSPACE, _ROOT = "/tmp", "/var"  # noqa: S108
_SYSTEM = ("usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32")
# What programs need to run and to know certificates; no keys.
_ETC = ("alternatives", "ssl/certs", "pki/tls/certs", "pki/ca-trust", "ld.so.cache", "localtime")
_ETC_OF_HOST_NETWORK = ("hosts", "resolv.conf", "nsswitch.conf")
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
_OWN_ETC = {
    "passwd": "root:x:0:0:root:/:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    "group": "root:x:0:\nnogroup:x:65534:\n",
    "hosts": "127.0.0.1 localhost\n::1 localhost\n",
    "resolv.conf": "# There is no name service here: http_proxy and https_proxy lead out.\n",
}

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    _checked(
        _libc.mount(
            source.encode(), target.encode(), kind.encode() or None, ctypes.c_ulong(flags), options.encode() or None
        ),
        f"mount {source} on {target}",
    )


def _bind(source: str, target: str, *, read_only: bool) -> None:
    """Show ``source`` at ``target``, which is made."""
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    _mount(source, target, flags=_MS_BIND | _MS_REC)
    if read_only:
        # Flags that the source has can't be taken away in a user namespace, and have to be named.
        kept = os.statvfs(target).f_flag & (_MS_NOSUID | _MS_NODEV | _MS_NOEXEC | 1024 | 2048)
        _mount("", target, flags=_MS_REMOUNT | _MS_BIND | _MS_RDONLY | kept)


def _die_with_parent() -> None:
    _checked(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")


def _unshare(flags: int) -> None:
    _checked(_libc.unshare(flags), "unshare")


def _hold(folder: str) -> None:
    _mount("none", "/", flags=_MS_REC | _MS_PRIVATE)
    _mount(folder, _WORKSPACE, flags=_MS_BIND)


def _is_hung_up(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, 0)
    return bool(poll.poll(0))


class Outer:
    """The process that makes the namespaces, and stays outside of the box's pid namespace."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._plan: dict[str, Any] = json.loads(control.recv(_MESSAGE_BYTES))
        self._inner = 0

    def run(self) -> int:
        """The exit status of the program, 128 + n when a signal ended it."""
        _die_with_parent()
        self._enter()
        listening = self._listen()
        socket.send_fds(self._control, [b"listening"], [item.fileno() for item in listening])
        self._expect(b"go")
        for item in listening:
            item.close()
        return self._fork()

    def _expect(self, message: bytes) -> None:
        if self._control.recv(_MESSAGE_BYTES) != message:
            os._exit(1)  # the builder is gone, or has given up

    def _enter(self) -> None:
        """Leave for the new namespaces, and become root of the user namespace."""
        # The kernel's killer takes a build before anything else.
        with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
        said = self._unshare()
        self._control.send(said)
        self._expect(b"mapped")
        if said == b"unshared":
            os.setgroups([])
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
            _die_with_parent()  # a change of ids forgets it
            if _is_hung_up(self._control.fileno()):
                os._exit(1)
        _libc.sethostname(b"build", 5)

    def _unshare(self) -> bytes:
        """New namespaces, in which the workspace is held where the box's root can reach it."""
        flags = _CLONE_NEWNS | _CLONE_NEWUTS | _CLONE_NEWIPC | _CLONE_NEWPID
        if self._plan["isolated"]:
            flags |= _CLONE_NEWNET
        if os.geteuid() != 0:
            _unshare(flags | _CLONE_NEWUSER)
            _hold(self._plan["folder"])
            return b"unshared"
        _unshare(_CLONE_NEWNS)  # the machine's root gets through to any folder, the box's root does not
        _hold(self._plan["folder"])
        try:
            _unshare(flags | _CLONE_NEWUSER)
        except OSError:
            _unshare(flags)
            return b"plain"
        return b"unshared"

    def _listen(self) -> list[socket.socket]:
        if not self._plan["isolated"]:
            return []
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            request = struct.pack("16sh14x", b"lo", 0)
            (flags,) = struct.unpack_from("h", ioctl(probe, _SIOCGIFFLAGS, request), 16)
            ioctl(probe, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | _IFF_UP))
        found = []
        for host, port in self._plan["listen"]:
            item = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
            item.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            item.bind((host, port))
            item.listen(128)
            found.append(item)
        return found

    def _fork(self) -> int:
        alive, kept = os.pipe()  # `kept` is open as long as this process lives
        signal.signal(signal.SIGTERM, self._end)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        self._inner = os.fork()
        if self._inner == 0:
            os.close(kept)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            Inner(self._control, self._plan).run(alive)
        os.close(alive)
        self._control.close()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return _wait_for(self._inner)

    def _end(self, _number: int, _frame: FrameType | None) -> None:
        os.kill(self._inner, signal.SIGKILL)  # with pid 1 all in its namespace ends


class Inner:
    """Pid 1 of the box: sets up what can be seen in it, runs the program, and buries the dead."""

    def __init__(self, control: socket.socket, plan: dict[str, Any]) -> None:
        self._control = control
        self._plan = plan

    def run(self, alive: int) -> NoReturn:
        """Run the program and end with its status, or with 125 when it can't be run."""
        _die_with_parent()
        if _is_hung_up(alive):
            os._exit(1)
        status = 125
        try:
            os.setsid()
            if self._plan["secret"]:
                self._keep_secret()
            _make_root(self._plan)
            os.chdir(self._plan["home"])
            for name, limit in self._plan["limits"].items():
                resource.setrlimit(getattr(resource, name), (limit, limit))
            program = os.fork()
            if program == 0:
                self._execute()
            self._control.close()
            status = _wait_for(program)
        except OSError as err:
            _report(self._control, err)
        finally:
            os._exit(status)

    def _keep_secret(self) -> None:
        """Hold it in memory, where the program opens it by /proc: which the kernel permits to who may trace us."""
        held = os.memfd_create("secret")
        os.write(held, self._plan["secret"].encode())
        os.dup2(held, self._plan["secret_fd"], inheritable=False)
        os.close(held)
        _checked(_libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0), "prctl")

    def _execute(self) -> NoReturn:
        argv: list[str] = self._plan["argv"]
        try:
            for number in (signal.SIGPIPE, signal.SIGXFSZ):
                signal.signal(number, signal.SIG_DFL)
            os.execvpe(argv[0], argv, self._plan["environment"])  # noqa: S606
        except OSError as err:
            _report(self._control, OSError(err.errno, f"{argv[0]}: {err.strerror}"))
        finally:
            os._exit(125)


def _report(control: socket.socket, err: OSError) -> None:
    with suppress(OSError):
        control.send(f"failed {err.errno or 0} {err.strerror or err}".encode())


def _wait_for(child: int) -> int:
    """The exit status of that child; others that end meanwhile are forgotten."""
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def _make_root(plan: dict[str, Any]) -> None:
    """A root folder with the system's programs, the workspace, and nothing else of the machine."""
    _mount("none", "/", flags=_MS_REC | _MS_PRIVATE)
    _mount("tmpfs", _ROOT, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=755,size=64m")
    _show_system(plan)
    _make_etc(plan)
    _bind(_WORKSPACE, f"{_ROOT}{plan['home']}", read_only=False)
    os.makedirs(f"{_ROOT}/tmp")  # noqa: S108
    _mount("tmpfs", f"{_ROOT}/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=1777,size=64m")  # noqa: S108
    _make_devices()
    _make_kernel_views()
    for name in ("var", "var/tmp", "run", "root", "mnt"):
        os.makedirs(f"{_ROOT}/{name}", exist_ok=True)
    _enter_root()


def _show_system(plan: dict[str, Any]) -> None:
    for name in _SYSTEM:
        path = f"/{name}"
        if os.path.islink(path):
            os.symlink(os.readlink(path), f"{_ROOT}{path}")
        elif os.path.isdir(path):
            _bind(path, f"{_ROOT}{path}", read_only=True)
    for path in plan["programs"]:  # those that are installed elsewhere
        os.makedirs(os.path.dirname(_ROOT + path), exist_ok=True)
        _bind(path, _ROOT + path, read_only=True)


def _make_etc(plan: dict[str, Any]) -> None:
    os.makedirs(f"{_ROOT}/etc")
    from_host = _ETC if plan["isolated"] else _ETC + _ETC_OF_HOST_NETWORK
    for name in from_host:
        if os.path.exists(f"/etc/{name}"):
            os.makedirs(os.path.dirname(f"{_ROOT}/etc/{name}"), exist_ok=True)
            _bind(os.path.realpath(f"/etc/{name}"), f"{_ROOT}/etc/{name}", read_only=True)
    for name, text in _OWN_ETC.items():
        if not os.path.exists(f"{_ROOT}/etc/{name}"):
            with open(f"{_ROOT}/etc/{name}", "w") as file:
                file.write(text)


def _make_devices() -> None:
    dev = f"{_ROOT}/dev"
    os.makedirs(dev)
    _mount("tmpfs", dev, "tmpfs", _MS_NOSUID, "mode=755,size=64k")
    for name in _DEVICES:
        if os.path.exists(f"/dev/{name}"):
            _bind(f"/dev/{name}", f"{dev}/{name}", read_only=False)
    for name, target in {"fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"}.items():
        os.symlink(target if target.startswith("/") else f"/proc/self/{target}", f"{dev}/{name}")
    os.makedirs(f"{dev}/shm")
    _mount("tmpfs", f"{dev}/shm", "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=1777,size=64m")
    os.makedirs(f"{dev}/pts")
    _mount("devpts", f"{dev}/pts", "devpts", _MS_NOSUID | _MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620")
    os.symlink("pts/ptmx", f"{dev}/ptmx")


def _make_kernel_views() -> None:
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    os.makedirs(f"{_ROOT}/proc")
    _mount("proc", f"{_ROOT}/proc", "proc", flags)
    os.makedirs(f"{_ROOT}/sys")
    with suppress(OSError):  # with the machine's network, it is not the box's to mount; few programs miss it
        _mount("sysfs", f"{_ROOT}/sys", "sysfs", flags | _MS_RDONLY)


def _enter_root() -> None:
    old = f"{_ROOT}/mnt"
    number = _SYS_PIVOT_ROOT[os.uname().machine]
    _checked(_libc.syscall(ctypes.c_long(number), _ROOT.encode(), old.encode()), "pivot_root")
    os.chdir("/")
    _checked(_libc.umount2(b"/mnt", _MNT_DETACH), "umount")


def main(arguments: Sequence[str]) -> int:
    """Run the box whose builder is on the other side of the socket ``arguments[1]``."""
    control = socket.socket(fileno=int(arguments[1]))
    control.set_inheritable(False)
    try:
        return Outer(control).run()
    except OSError as err:
        _report(control, err)
        return 125


if __name__ == "__main__":
    sys.exit(main(sys.argv))

"""The keeper: a process that owns one child process and ends it when the keeper's own owner is gone.

Run by file path with the standard library alone (`python -I -S keeper.py ...`); `bt_ray.slot.child` is the owner's side.

    keeper.py GRACE_S LOG_FILE PASSED_FD COMMAND [ARG ...]

The owner holds the write end of the pipe that is the keeper's standard input. However the owner goes (SIGKILL included),
the pipe closes, and the keeper ends the child: SIGTERM to its process group, GRACE_S seconds, SIGKILL, then SIGKILL for
every descendant that is left. Standard output carries two lines of JSON to the owner: the child's pid, and at the end its
exit status. The keeper detaches by a double fork, so that nothing which kills the owner's children kills the keeper.
Whoever is killed cannot remove its shared memory: the keeper does that afterwards.

PASSED_FD is a file descriptor that the child inherits, or -1.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
LOOK_S = 5.0
"""Seconds between two looks at what shared memory the child has: once it is killed, nobody knows."""
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - that is where it is


def main() -> None:
    grace_s, log_file, passed_fd = float(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    detach()
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)
    began = time.time()
    child = start(sys.argv[4:], log_file, passed_fd, libc)
    report({"pid": child.pid})
    pidfd = os.pidfd_open(child.pid)
    readable: list[int] = []
    shared: set[str] = set()
    while not readable:
        readable, _, _ = select.select([pidfd, sys.stdin.fileno()], [], [], LOOK_S)
        shared |= find_shared_memory(began, child.pid)
    if pidfd not in readable:
        signal_group(child.pid, signal.SIGTERM)
        select.select([pidfd], [], [], grace_s)
        shared |= find_shared_memory(began, child.pid)
    signal_group(child.pid, signal.SIGKILL)
    status = child.wait()
    kill_descendants()
    for file in shared:
        with contextlib.suppress(OSError):  # whoever made it has removed it
            os.unlink(os.path.join(SHARED_MEMORY, file))
    report({"exit": status})


def detach() -> None:
    """Become a process that is no child of the owner, in a session of its own."""
    if os.fork():
        os._exit(0)
    os.setsid()


def start(command: list[str], log_file: str, passed_fd: int, libc: ctypes.CDLL) -> "subprocess.Popen[bytes]":
    def in_child() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(name, signal.SIG_DFL)

    with open(log_file, "ab", buffering=0) as log:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=() if passed_fd < 0 else (passed_fd,),
            preexec_fn=in_child,  # noqa: PLW1509 - the keeper has one thread
        )
    if passed_fd >= 0:
        os.close(passed_fd)
    return child


def report(message: dict[str, int]) -> None:
    with contextlib.suppress(OSError):  # the owner may be gone: there is nobody to tell
        os.write(sys.stdout.fileno(), json.dumps(message).encode() + b"\n")


def signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def kill_descendants() -> None:
    """Kill and reap what is left: as subreaper the keeper is the parent of every orphan below it."""
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            for orphan in children():
                os.kill(orphan, signal.SIGKILL)
            os.waitpid(-1, 0)


def find_shared_memory(began: float, child: int) -> set[str]:
    """The files in shared memory that the child and its descendants made, `began` being when it was started.

    They are those that a process which still lives has mapped, and semaphores that are named after a process.
    """
    try:
        files = [entry for entry in os.scandir(SHARED_MEMORY) if entry.stat(follow_symlinks=False).st_ctime >= began - 1]
    except OSError:
        return set()
    own = {child, *descendants(os.getpid())}
    mapped = "".join(maps_of(pid) for pid in own)
    return {
        entry.name
        for entry in files
        if f"{SHARED_MEMORY}/{entry.name}" in mapped or any(f"-{pid}-" in entry.name for pid in own)
    }


def maps_of(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/maps") as maps:
            return maps.read()
    except OSError:
        return ""


def descendants(pid: int) -> set[int]:
    below = set(children(pid))
    for child in list(below):
        below |= descendants(child)
    return below


def children(of: int | None = None) -> list[int]:
    parent_wanted, found = of or os.getpid(), []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as stat:
                    parent = int(stat.read().rpartition(")")[2].split()[1])
            except (OSError, ValueError):
                continue
            if parent == parent_wanted:
                found.append(int(name))
    return found


if __name__ == "__main__":
    main()

"""A child process ends with its owner, whatever tree it grew and however the owner goes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from bt_ray.errors import InfrastructureError
from bt_ray.slot.child import ChildProcess, child_environment, open_port

# A child with a grandchild, one in a session of its own, and one that is nobody's child; SIGTERM is ignored by all.
TREE = """
trap '' TERM
sleep 300 &
setsid sleep 300 &
(setsid sh -c "trap '' TERM; sleep 300" &)
echo grown
sleep 300
"""

OWNER = f"""
import os, sys, time
from pathlib import Path
from bt_ray.slot.child import ChildProcess, child_environment
child = ChildProcess(["sh", "-c", {TREE!r}], env=child_environment(), log_file=Path(sys.argv[1]), grace_s=0.2)
print(child.pid, flush=True)
time.sleep(300)
"""


def await_text(path: Path, text: str) -> None:
    deadline = time.monotonic() + 20
    while text not in (path.read_text() if path.exists() else ""):
        assert time.monotonic() < deadline, f"{text!r} never came"
        time.sleep(0.02)


def await_gone(processes: list[psutil.Process]) -> list[psutil.Process]:
    return psutil.wait_procs(processes, timeout=20)[1]


def tree_of(pid: int) -> list[psutil.Process]:
    """The child, its descendants, its keeper, and the keeper's orphans."""
    keeper = psutil.Process(pid).parent()
    assert keeper is not None
    assert "keeper.py" in " ".join(keeper.cmdline())
    tree = [keeper, *keeper.children(recursive=True)]
    assert len(tree) >= 5
    return tree


def test_stop_ends_the_whole_tree(tmp_path: Path) -> None:
    child = ChildProcess(["sh", "-c", TREE], env=child_environment(), log_file=tmp_path / "log", grace_s=0.2)
    await_text(tmp_path / "log", "grown")
    tree = tree_of(child.pid)
    child.stop()
    assert not child.alive
    assert child.returncode == -signal.SIGKILL
    assert await_gone(tree) == []
    child.stop()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_owners_death_ends_the_whole_tree(tmp_path: Path, how: signal.Signals) -> None:
    log = tmp_path / "log"
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(log)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    await_text(log, "grown")
    tree = tree_of(pid)
    owner.send_signal(how)
    owner.wait()
    assert await_gone(tree) == []


def test_an_owner_that_dies_before_its_child_is_known_leaves_nothing(tmp_path: Path) -> None:
    mark = f"mark-{os.getpid()}"
    code = OWNER.replace("print(child.pid, flush=True)", "os.kill(os.getpid(), 9)")
    for _ in range(3):
        env = {**os.environ, "OWNED_BY": mark}
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "log")], env=env, check=False)
    left = [process for process in psutil.process_iter() if carries(process, mark)]
    assert await_gone(left) == []


def carries(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get("OWNED_BY") == mark
    except psutil.Error:
        return False


def test_an_exit_is_noticed_with_its_status_and_last_lines(tmp_path: Path) -> None:
    command = ["sh", "-c", "for i in 1 2 3 4; do echo line $i; done; exit 3"]
    for _ in range(2):
        child = ChildProcess(command, env=child_environment(), log_file=tmp_path / "log")
        assert child.wait(20) == 3
        assert child.log_tail(2) == "line 3\nline 4"
        assert child.log_tail(99).count("line 1") == 1, "an earlier child's lines are not this one's"
        child.stop()


def test_a_program_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InfrastructureError, match="no-such-program"):
        ChildProcess(["/no-such-program"], env=child_environment(), log_file=tmp_path / "log")


def test_a_child_listens_on_the_socket_that_it_was_given(tmp_path: Path) -> None:
    listening, port = open_port("127.0.0.1")
    code = "import socket, sys; s = socket.socket(fileno=int(sys.argv[1])); s.listen(); c, _ = s.accept(); c.send(b'hello')"
    with listening:
        command = [sys.executable, "-c", code, str(listening.fileno())]
        child = ChildProcess(command, env=child_environment(), log_file=tmp_path / "log", passed_socket=listening)
    import socket

    deadline = time.monotonic() + 20
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port)) as connection:
                assert connection.recv(5) == b"hello"
            break
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert child.wait(20) == 0
    child.stop()


def test_rays_own_settings_do_not_reach_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    env = child_environment()
    assert "RAY_AUTH_TOKEN" not in env
    assert "OMP_NUM_THREADS" not in env


SHARING = """
import os, sys, time
from multiprocessing import resource_tracker, shared_memory
resource_tracker.register = lambda *arguments: None  # as if its tracker were killed with it
mapped = shared_memory.SharedMemory(create=True, size=1024)
semaphore = f"/dev/shm/sem.test-{os.getpid()}-x"
open(semaphore, "w").close()
print(f"/dev/shm/{mapped.name} {semaphore} ready", flush=True)
if len(sys.argv) > 1:
    os.fork()
time.sleep(300)
"""


@pytest.mark.parametrize("forks", [False, True])
@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_nothing_stays_in_shared_memory(tmp_path: Path, how: str, forks: bool) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-c", SHARING, *(["fork"] if forks else [])]
    child = ChildProcess(command, env=child_environment(), log_file=log, grace_s=0.2)
    await_text(log, "ready")
    mapped, semaphore, _ = log.read_text().split()
    if how == "killed":
        time.sleep(0 if forks else 5.5)  # what nobody else has mapped is known to the keeper since its last look
        os.kill(child.pid, signal.SIGKILL)
        child.wait(20)
    child.stop()
    assert not Path(semaphore).exists()
    assert not Path(mapped).exists()

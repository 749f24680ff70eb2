"""The path of a new user on real vLLM, bt_ray installed from its wheel: from `bt-ray init` to a served, exported winner."""

import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
from conftest import ROOT, SUPPORT
from support.processes import MarkedProcesses, wait_for

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]


@dataclass(frozen=True)
class User:
    """Somebody with an empty home, bt_ray in an environment of their own, and a model."""

    home: Path
    python: Path
    model: Path
    processes: MarkedProcesses

    @property
    def environment(self) -> dict[str, str]:
        path = f"{self.python.parent}:/usr/local/bin:/usr/bin:/bin"
        mark = {"BT_RAY_TEST_RUN": self.processes.mark}
        return {"HOME": str(self.home), "PATH": path, "PYTHONUNBUFFERED": "1", **mark}

    @property
    def bt_ray(self) -> str:
        return str(self.python.with_name("bt-ray"))

    def does(self, *command: str) -> str:
        """What a `bt-ray` command says that succeeds."""
        return self._said(self.bt_ray, *command)

    def runs(self, code: str) -> str:
        """What Python says to some code."""
        return self._said(str(self.python), "-c", code)

    def _said(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, cwd=self.home, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[User]:
    folder = tmp_path_factory.mktemp("new_user")
    source, environment, home = folder / "source", folder / "environment", folder / "home"
    home.mkdir()
    shutil.copytree(ROOT / "bt_ray", source / "bt_ray", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "what_it_needs.pth").write_text(sysconfig.get_path("purelib"))  # vLLM, Ray, DSPy: not this checkout's bt_ray
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--ignore-installed", str(source)], check=True)
    subprocess.run([sys.executable, str(SUPPORT / "tiny_model.py"), str(home / "model"), "4096"], check=True)
    made = User(home, python, home / "model", MarkedProcesses())
    yield made
    assert not made.processes.all(), "nothing stays"


@pytest.fixture(scope="module")
def run_dir(user: User) -> Path:
    """The run directory of the starter's sweep, with the edits that its comments ask for."""
    user.does("init", "first")
    file = user.home / "first" / "sweep.toml"
    text = file.read_text()
    assert [line.partition(" =")[0] for line in text.splitlines() if "# EDIT" in line] == ["model", "count", "gpus"]
    file.write_text(re.sub(r'^model = "[^"]*"', f'model = "{user.model}"', text, flags=re.MULTILINE))
    assert "All good." in user.does("check", "first/sweep.toml")
    assert "To compute: 5" in user.does("plan", "first/sweep.toml")
    said = user.does("sweep", "first/sweep.toml")
    assert "Best program" in said
    return user.home / "first" / "runs" / "first"


def test_the_sweep_is_told_of(user: User, run_dir: Path) -> None:
    where = user.runs("import bt_ray; print(bt_ray.__file__)")
    assert Path(where.strip()).is_relative_to(user.python.parents[1])
    assert "ended" in user.does("status", "first/runs/first")
    page = Path(user.does("report", "first/runs/first").strip())
    assert page.read_text().startswith("<!doctype html>")


@contextmanager
def started(user: User, *command: str, **environment: str) -> Iterator[Path]:
    """A command that runs until Ctrl-C; what it says goes to the file given."""
    output = user.home / "output.txt"
    with output.open("w") as opened:
        process = subprocess.Popen(
            command, env={**user.environment, **environment}, cwd=user.home, stdout=opened, stderr=subprocess.STDOUT
        )
    try:
        yield output
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()
        wait_for("its processes to be gone", lambda: not user.processes.all())


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def likely_starts(address: str, model: str, token: str) -> list[dict[str, float]]:
    """With which token a server's answers to some prompts most likely begin, and how likely, with the plain client."""
    found = []
    with openai.OpenAI(base_url=address, api_key=token, max_retries=0) as client:
        for prompt in ("The battery is a joy to use.", "It broke after a week.", "[[ ## review ## ]]\nsupport", "answer"):
            answer = client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": prompt}],
                temperature=0,
                max_tokens=1,
                logprobs=True,
                top_logprobs=1,
            )
            logprobs = answer.choices[0].logprobs
            assert logprobs is not None
            assert logprobs.content is not None
            found.append({str(start.bytes): start.logprob for start in logprobs.content[0].top_logprobs})
    return found


def test_the_winner_is_served_and_its_export_answers_the_same_without_bt_ray(user: User, run_dir: Path) -> None:
    serve = [user.bt_ray, "serve", "first/runs/first", "--port", str(free_port())]
    with started(user, *serve) as output:
        wait_for("the address", lambda: "print(program" in output.read_text())
        said = dict(re.findall(r"^(model|address|token) +(\S+)$", output.read_text(), re.MULTILINE))
        with pytest.raises(openai.AuthenticationError):
            likely_starts(said["address"], said["model"], "another")
        served = likely_starts(said["address"], said["model"], said["token"])
        lines = re.search(r"^import bt_ray\n.*^program = .*?$", output.read_text(), re.MULTILINE | re.DOTALL)
        assert lines is not None
        assert user.runs(f"{lines[0]}\nprint(type(program).__name__)") == "Predict\n"

    user.does("export", "first/runs/first", "--to", "exported")
    exported = user.home / "exported"
    port = free_port()
    blocked = "import sys; sys.modules['bt_ray'] = None; import runpy; "
    run = "sys.argv[0] = 'api_server'; runpy.run_module('vllm.entrypoints.openai.api_server', run_name='__main__')"
    options = ["--model", str(exported / "model"), "--served-model-name", "exported", "--port", str(port)]
    options += ["--host", "127.0.0.1", "--max-model-len", "4096", "--api-key", "key"]
    with started(user, str(user.python), "-c", blocked + run, *options, **ON_CPU):
        wait_for("vLLM alone", lambda: is_up(port))
        exported_starts = likely_starts(f"http://127.0.0.1:{port}/v1", "exported", "key")
        assert exported_starts == [pytest.approx(starts, abs=0.1) for starts in served]


ON_CPU = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""What vLLM's CPU build needs on a machine that says nothing of its cores, and what makes it start sooner."""


def is_up(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        time.sleep(0.5)
        return False

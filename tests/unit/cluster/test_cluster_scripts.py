"""The scripts below `cluster/` for SkyPilot and Slurm, with stand-ins for the commands that they start."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import cluster_traps as traps
from support.cluster_files import CLUSTER, of_bt_ray, of_ray, shipped, sweep_settings

from bt_ray.pool.resources import check_resources

STAND_IN = """#!{python}
import json, os, sys, time
name = os.path.basename(sys.argv[0])
kept = {{key: value for key, value in os.environ.items() if key.startswith(("RAY_", "DSPY_"))}}
with open({log!r}, "a") as log:
    log.write(json.dumps([[name, *sys.argv[1:]], kept]) + "\\n")
if name == "scontrol":
    print("node1\\nnode2")
if name == "srun":
    start = next(index for index, word in enumerate(sys.argv) if word == "ray")
    os.execvp("ray", sys.argv[start:])
if "--block" in sys.argv and "--head" in sys.argv:
    time.sleep(60)
"""
TOKEN = "0123456789abcdef"


class Nodes:
    """A folder of stand-ins, and what was started of them."""

    def __init__(self, folder: Path, *names: str) -> None:
        self._folder = folder / "bin"
        self._folder.mkdir()
        self._log = folder / "log"
        for name in names:
            path = self._folder / name
            path.write_text(STAND_IN.format(python=sys.executable, log=str(self._log)))
            path.chmod(0o755)

    def run(self, *command: str, env: dict[str, str]) -> list[tuple[list[str], dict[str, str]]]:
        """The commands that were started, each with Ray's part of its environment."""
        path = f"{self._folder}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            command,
            env={"HOME": str(self._folder.parent), "PATH": path, **env},
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode()
        return [tuple(json.loads(line)) for line in self._log.read_text().splitlines()]


def test_slurm_starts_ray_with_a_token_and_a_sweep_on_all_its_gpus(tmp_path: Path) -> None:
    allocation = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_ON_NODE": "64",
        "SLURM_GPUS_ON_NODE": "4",
    }
    more = ["--set", "trial.step_retries=3"]
    nodes = Nodes(tmp_path, "scontrol", "srun", "ray")
    started = nodes.run("bash", str(CLUSTER / "slurm.sh"), "my/sweep.toml", "/shared/runs/today", *more, env=allocation)
    _, (srun, _), (ray, env) = started
    of_ray(ray)
    assert ray[:6] == ["ray", "symmetric-run", "--address", "node1:6379", "--min-nodes", "2"]
    assert {"--num-cpus=64", "--num-gpus=4"} < set(ray)
    of_ray(["ray", "start", *ray[6 : ray.index("--")]])
    sweep = ray[ray.index("--") + 1 :]
    of_bt_ray(sweep)
    config = sweep_settings(sweep)
    assert (config.server.count, config.server.gpus, config.run_dir) == (8, 1, "/shared/runs/today")
    assert check_resources(config, [{"CPU": 64, "GPU": 4}, {"CPU": 64, "GPU": 4}]) == []
    assert (config.trial.step_retries, config.autoscaling) == (3, False)
    assert env["RAY_AUTH_MODE"] == "token"
    assert len(env["RAY_AUTH_TOKEN"]) == 64
    assert env["RAY_AUTH_TOKEN"] not in str(srun + ray)
    assert not env["DSPY_CACHEDIR"].startswith(str(tmp_path))


def test_two_allocations_have_two_tokens(tmp_path: Path) -> None:
    found = set()
    for job in ("7", "8"):
        (tmp_path / job).mkdir()
        env = {"SLURM_JOB_ID": job, "SLURM_JOB_NODELIST": "n", "SLURM_JOB_NUM_NODES": "1"}
        env |= {"SLURM_CPUS_ON_NODE": "8", "SLURM_GPUS_ON_NODE": "1"}
        nodes = Nodes(tmp_path / job, "scontrol", "srun", "ray")
        found.add(
            nodes.run("bash", str(CLUSTER / "slurm.sh"), "my/sweep.toml", "s3://b/r", env=env)[-1][1]["RAY_AUTH_TOKEN"]
        )
    assert len(found) == 2


@pytest.mark.parametrize("arguments", [[], ["my/sweep.toml"]])
def test_slurm_starts_nothing_without_a_sweep_and_a_run_directory(tmp_path: Path, arguments: list[str]) -> None:
    with pytest.raises(AssertionError, match=r"the (TOML|run directory)"):
        Nodes(tmp_path).run("bash", str(CLUSTER / "slurm.sh"), *arguments, env={})


def sky_run(tmp_path: Path, rank: int) -> list[tuple[list[str], dict[str, str]]]:
    task = shipped("skypilot.yaml").value
    env = {
        **task["envs"],
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_RAYLET_PID": "1",
        "RAY_ADDRESS": "127.0.0.1:6380",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NODE_RANK": str(rank),
        "SKYPILOT_NUM_NODES": str(task["num_nodes"]),
        "SKYPILOT_NUM_GPUS_PER_NODE": "1",
    }
    return Nodes(tmp_path, "ray", "bt-ray").run("bash", "-c", task["run"], env=env)


def test_skypilots_first_machine_starts_a_head_with_a_token_and_the_sweep(tmp_path: Path) -> None:
    started = sky_run(tmp_path, rank=0)
    for words, env in started:
        (of_ray if words[0] == "ray" else of_bt_ray)(words)
        assert env == {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
        assert TOKEN not in str(words)
    commands = [words for words, _ in started]
    assert ["ray", "start", "--head", "--port=6379", "--num-gpus=1", "--block"] in commands
    (sweep,) = [words for words in commands if words[0] == "bt-ray"]
    assert sweep[sweep.index("--address") + 1] == "10.0.0.1:6379"
    config = sweep_settings(sweep)
    assert config.autoscaling, "the other machines may join later"
    assert (config.server.count, config.server.gpus) == (shipped("skypilot.yaml").value["num_nodes"], 1)
    assert str(config.run_dir).startswith(traps.BUCKETS), "no disk outlives its machine"


def test_skypilots_other_machines_join_and_end_well(tmp_path: Path) -> None:
    commands = [words for words, _ in sky_run(tmp_path, rank=1)]
    assert commands[-1] == ["ray", "start", "--address=10.0.0.1:6379", "--num-gpus=1", "--block"]
    assert not [words for words in commands if words[0] == "bt-ray" or "--head" in words]


def test_skypilot_needs_a_token_and_leaves_its_own_ray_alone() -> None:
    task = shipped("skypilot.yaml").value
    assert task["secrets"] == {"RAY_AUTH_TOKEN": None}
    assert task["resources"]["use_spot"] is True
    assert "ray stop" not in task["run"]

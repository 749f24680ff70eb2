"""`scripts/gpu_check.sh` tells what its parts printed, and of those that did not run that they are not measured yet."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[3] / "scripts"


def check(logs: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(SCRIPTS / "gpu_check.sh"), *arguments]
    env = {**os.environ, "GPU_CHECK_LOGS": str(logs)}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def printed(file: Path, *calls: Callable[[], None]) -> None:
    with file.open("w") as output, contextlib.redirect_stdout(output):
        for call in calls:
            call()


def rows(told: str) -> dict[str, str]:
    lines = [line.strip("| ").split(" | ") for line in told.splitlines() if line.startswith("|") and " | " in line]
    return dict(lines)


def test_the_table_has_the_figures_of_the_parts_that_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(SCRIPTS), *sys.path])
    import bench_swap

    (tmp_path / "gpus.txt").write_text("NVIDIA H200\n" * 2)
    printed(
        tmp_path / "swap-reload.txt",
        lambda: bench_swap.show("relaunch", [30.0, 20.0, 25.0]),
        lambda: bench_swap.show("swap to the fine-tune", [0.5, 0.4, 0.6]),
        lambda: bench_swap.show("swap to the base", [0.1]),
        lambda: bench_swap.show_ratio([25.0], [0.5]),
    )
    printed(
        tmp_path / "swap-adapter.txt",
        lambda: bench_swap.show("relaunch", [25.0]),
        lambda: bench_swap.show("another adapter", [0.25]),
        lambda: bench_swap.show_ratio([25.0], [0.25]),
    )
    printed(
        tmp_path / "swap-sleep.txt",
        lambda: bench_swap.show("relaunch", [25.0]),
        lambda: bench_swap.show("wake and swap", [2.5]),
        lambda: bench_swap.show_ratio([25.0], [2.5]),
    )
    (tmp_path / "sweep.txt").write_text(
        "\nwall time, sweep / loop  0.470\nbest score               sweep 96.0 %, loop 96.0 %\n"
    )
    (tmp_path / "train.txt").write_text(
        "shape  data         batch  way              s / step  tokens / s  padding  peak GiB  first loss\n"
        "8b     alike            4  plain               0.274        8752       0%      30.8      11.673\n"
        "8b     alike            4  plain by length     0.277        7940       0%      30.8      11.663\n"
        "8b     different        4  plain by length     0.573        7234       4%      65.5      11.490\n"
    )
    table = rows(check(tmp_path, "--table").stdout)
    assert table.pop("on 2 NVIDIA H200") == "figure"
    assert table.pop("A verified swap by reload, against a relaunch") == "0.50 s and 25.00 s: 50.0 times"
    assert table.pop("A LoRA step of 4 conversations, 8b, prompts alike; different") == (
        "0.277 s (7940 tokens/s, 30.8 GiB); 0.573 s (7234 tokens/s, 65.5 GiB)"
    )
    assert table.pop("Another adapter, against a relaunch") == "0.25 s and 25.00 s: 100.0 times"
    assert table.pop("A server that slept during a training, awake and swapped") == "2.50 s and 25.00 s: 10.0 times"
    assert table.pop("The demo's six strategies, wall time against the loop's") == "0.470"
    assert set(table.values()) == {"not measured yet"}
    assert len(table) == 3


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="it would begin")
@pytest.mark.parametrize(
    ("arguments", "told"),
    [(("--what",), "unknown argument --what"), (("--only", "swap"), "there is no NVIDIA GPU here")],
)
def test_what_it_cannot_do_it_says(tmp_path: Path, arguments: tuple[str, ...], told: str) -> None:
    done = check(tmp_path, *arguments)
    assert done.returncode == 1
    assert told in done.stderr

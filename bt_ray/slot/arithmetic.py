"""Which arithmetic this node's CPU is fast in: bfloat16 where the processor has instructions for it, else float32.

    python -m bt_ray.slot.arithmetic        measures, and prints what it found as JSON

Most laptops and many servers have no bfloat16 instructions, and take tens of times longer for a product in it. The product
is measured: that sees more than a list of processor flags would, such as a hypervisor's mask or a PyTorch without kernels.
A child process does it, since only children import torch. The figures stay on the node's own disk, so that all servers,
trainings and checks on a node decide alike.
"""

import hashlib
import importlib.metadata
import json
import platform
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from bt_ray.errors import ServerError
from bt_ray.run_dir.node_disk import node_cache
from bt_ray.slot.child import child_environment

Dtype = Literal["float32", "bfloat16"]

SIZE = 384
"""Rows and columns of the matrices that are multiplied: a product takes about 3 ms in float32 on one core."""
REPEATS = 5
WORTH = 1.5
"""How much faster a product must be in bfloat16: part of what is won there is lost to conversions."""
TIMEOUT_S = 180.0
ISA_VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
"""Environment variables that keep PyTorch's kernels from a processor's instructions."""
CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Arithmetic:
    """How fast one core multiplies matrices.

    Attributes:
        float32: GFLOP/s.
        bfloat16: GFLOP/s.
    """

    float32: float
    bfloat16: float

    @property
    def dtype(self) -> Dtype:
        """What servers and trainings compute in on this node."""
        return "bfloat16" if self.bfloat16 >= WORTH * self.float32 else "float32"

    @property
    def gflops(self) -> float:
        """GFLOP/s of one core in that."""
        return max(self.float32, self.bfloat16) if self.dtype == "bfloat16" else self.float32

    def __str__(self) -> str:
        return (
            f"{self.dtype} (a product of matrices on one core: {self.float32:.3g} GFLOP/s in float32, "
            f"{self.bfloat16:.3g} in bfloat16)"
        )


def cpu_arithmetic(env: Mapping[str, str] | None = None) -> Arithmetic:
    """The arithmetic of this node, measured once and then read from the node's disk.

    Args:
        env: Variables that servers and trainings get beside this process's own.

    Raises:
        ServerError: It could not be measured, because PyTorch cannot be imported for instance.
        StorageError: The node's folder cannot be used.
    """
    env = {**child_environment(), **(env or {}), "OMP_NUM_THREADS": "1"}
    file = node_cache() / f"arithmetic-{_node_digest(env)}.json"
    try:
        return Arithmetic(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):  # not measured yet, or by another version
        measured = _measure_in_child(env)
    part = file.with_name(f".{file.name}-{secrets.token_hex(4)}")
    part.write_text(json.dumps(asdict(measured)))
    part.rename(file)
    return measured


def processor() -> str:
    """This machine's processor: its name, and a digest of what it can do, since machines of a cloud share names."""
    try:
        lines = CPU_INFO.read_text().splitlines()
    except OSError:
        lines = []
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    flags = " ".join(sorted(found.get("flags", found.get("Features", "")).split()))
    return f"{found.get('model name', platform.machine())} {hashlib.sha256(flags.encode()).hexdigest()[:8]}"


def _node_digest(env: Mapping[str, str]) -> str:
    """Names what the figures hold for."""
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch = ""
    text = json.dumps([processor(), torch, [env.get(name) for name in ISA_VARIABLES], SIZE, REPEATS])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _measure_in_child(env: Mapping[str, str]) -> Arithmetic:
    command = [sys.executable, "-m", "bt_ray.slot.arithmetic"]
    try:
        run = subprocess.run(command, env=dict(env), capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise ServerError(f"The CPU's arithmetic was not measured within {TIMEOUT_S:.0f} s.") from error
    if run.returncode:
        reason = (run.stderr.strip().splitlines() or ["no output"])[-1]
        raise ServerError(
            f"The CPU's arithmetic could not be measured: {reason}. A server on CPU needs PyTorch: install bt-ray[cpu], or "
            'set server.dtype and train.dtype to "float32".'
        )
    return Arithmetic(**json.loads(run.stdout.splitlines()[-1]))


def measure() -> Arithmetic:
    """Multiply matrices on one core of this machine. Imports torch."""
    import torch

    torch.set_num_threads(1)
    best: dict[torch.dtype, float] = {}
    matrices = {dtype: torch.randn(SIZE, SIZE).to(dtype) for dtype in (torch.float32, torch.bfloat16)}
    for matrix in matrices.values():
        matrix @ matrix  # the first product of a kind prepares its kernel
    for _ in range(REPEATS):  # by turns, so that a neighbour's load slows both
        for dtype, matrix in matrices.items():
            began = time.perf_counter()
            matrix @ matrix
            best[dtype] = min(best.get(dtype, float("inf")), time.perf_counter() - began)
    figures = {dtype: round(2 * SIZE**3 / seconds / 1e9, 3) for dtype, seconds in best.items()}
    return Arithmetic(float32=figures[torch.float32], bfloat16=figures[torch.bfloat16])


if __name__ == "__main__":
    print(json.dumps(asdict(measure())))  # noqa: T201 - its owner reads it

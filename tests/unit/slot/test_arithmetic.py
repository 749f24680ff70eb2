"""The arithmetic follows the machine: measured once, kept on the node, and what is written goes first."""

import json
from pathlib import Path

import pytest

from bt_ray.errors import ServerError
from bt_ray.settings.config import ServerConfig, TrainConfig
from bt_ray.slot import arithmetic
from bt_ray.slot.arithmetic import Arithmetic, cpu_arithmetic
from bt_ray.slot.serving.server import server_command, server_dtype
from bt_ray.slot.training.job import training_dtype
from bt_ray.weights import Weights

SLOW_IN_BFLOAT16 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
"""Has a processor compute as one does that has AVX2 alone."""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BT_RAY_CACHE", str(tmp_path))
    return tmp_path


def keep(cache: Path, monkeypatch: pytest.MonkeyPatch, float32: float, bfloat16: float) -> None:
    """Have this machine's arithmetic measured as this."""
    monkeypatch.setattr(arithmetic, "_measure_in_child", lambda env: Arithmetic(float32, bfloat16))


@pytest.mark.parametrize(
    ("processor", "float32", "bfloat16", "dtype"),
    [
        ("AVX2 alone", 44.0, 0.8, "float32"),
        ("AVX-512 without bfloat16", 170.0, 34.0, "float32"),
        ("as fast in both", 100.0, 110.0, "float32"),
        ("AVX-512 bfloat16", 100.0, 190.0, "bfloat16"),
        ("AMX", 186.0, 1084.0, "bfloat16"),
    ],
)
def test_both_kinds_of_processors_compute_in_what_they_are_fast_in(
    cache: Path, monkeypatch: pytest.MonkeyPatch, processor: str, float32: float, bfloat16: float, dtype: str
) -> None:
    keep(cache, monkeypatch, float32, bfloat16)
    assert server_dtype(ServerConfig()) == dtype
    assert training_dtype(ServerConfig(), TrainConfig()) == dtype
    assert f"{dtype} (a product" in str(cpu_arithmetic())


def test_what_is_written_goes_first_and_is_what_vllm_gets(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(cache, monkeypatch, 44.0, 0.8)
    config = ServerConfig.model_validate({"dtype": "bfloat16"})
    assert server_dtype(config) == "bfloat16"
    assert training_dtype(config, TrainConfig()) == "float32"
    assert training_dtype(ServerConfig(), TrainConfig(dtype="bfloat16")) == "bfloat16"
    weights = Weights("m", "/models/m")
    for written, dtype in (({"dtype": "bfloat16"}, "bfloat16"), ({"dtype": "auto"}, "float32"), ({}, "float32")):
        config = ServerConfig.model_validate(written)
        command = server_command(weights, config, server_dtype(config), 3)
        assert command[command.index("--dtype") + 1] == dtype
        assert command.count("--dtype") == 1


def test_a_gpu_and_another_program_choose_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "_measure_in_child", lambda env: pytest.fail("measured for nothing"))
    for config in (ServerConfig(gpus=1), ServerConfig(command=("python", "server.py"))):
        assert server_dtype(config) is None
        assert "--dtype" not in server_command(Weights("m", "/m"), config, None, 3)
    assert training_dtype(ServerConfig(gpus=1), TrainConfig()) == "bfloat16"


def test_this_machine_is_measured_once_and_acting_as_another_kind_is_slow_in_bfloat16(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = cpu_arithmetic()
    assert measured.float32 > 0 < measured.bfloat16
    old = cpu_arithmetic(SLOW_IN_BFLOAT16)
    assert (old.dtype, old.bfloat16 < old.float32 / 4) == ("float32", True), old
    monkeypatch.setattr(arithmetic, "_measure_in_child", lambda env: pytest.fail("measured twice"))
    assert (cpu_arithmetic(), cpu_arithmetic(SLOW_IN_BFLOAT16)) == (measured, old)
    for file in cache.glob("arithmetic-*.json"):
        file.write_text(json.dumps({"of": "another version"}))
    keep(cache, monkeypatch, 1.0, 2.0)
    assert cpu_arithmetic() == Arithmetic(1.0, 2.0)


def test_a_machine_without_pytorch_is_told_what_to_do(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    with pytest.raises(ServerError, match=r"no torch here. A server on CPU needs PyTorch: install bt-ray\[cpu\]"):
        cpu_arithmetic({"PYTHONPATH": f"{tmp_path}:{arithmetic.__file__.removesuffix('/bt_ray/slot/arithmetic.py')}"})


def test_a_setting_that_only_moves_last_bits_is_in_no_key_unless_it_is_written() -> None:
    assert "dtype" not in TrainConfig().of_the_result()
    assert TrainConfig(dtype="float32").of_the_result()["dtype"] == "float32"

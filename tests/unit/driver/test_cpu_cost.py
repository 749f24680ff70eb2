"""What a sweep takes on this machine's CPU is said before it begins."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import dspy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.known import task

from bt_ray.driver import cpu_cost
from bt_ray.driver.cpu_cost import CpuCost, Model, count_shared, describe_cost, describe_here, estimate_cost, in_words
from bt_ray.settings.config import SweepConfig, make_config
from bt_ray.slot.arithmetic import Arithmetic

MODEL = Model(body=100_000_000, head=30_000_000, layers=10)
SLOW, FAST = Arithmetic(40.0, 0.8), Arithmetic(100.0, 1000.0)
PROMPTS = [[*range(200), number, *range(99)] for number in range(8)]


def config(**sections: Any) -> SweepConfig:
    return make_config({"task": "task.py:build", "model": "/m", "strategies": ["w"], **sections})


def cost(arithmetic: Arithmetic = SLOW, **sections: Any) -> CpuCost:
    return estimate_cost(MODEL, arithmetic, config(**sections), task(), PROMPTS, 20)


def test_the_times_follow_the_processor_the_tokens_and_the_settings() -> None:
    slow = cost()
    assert cost(FAST).training_s < slow.training_s / 4
    assert cost(train={"layers": 5}).training_s < 0.8 * slow.training_s
    assert cost(train={"layers": 99}).training_s == cost(train={"layers": 10}).training_s == slow.training_s
    assert cost(train={"epochs": 6}).training_s == pytest.approx(2 * slow.training_s)
    assert cost(train={"batch_size": 20}).training_s < slow.training_s, "the shared beginning is computed once for a batch"
    assert cost(train={"method": "full"}).training_s > slow.training_s
    assert cost(server={"threads": 2}).evaluation_s == pytest.approx(slow.evaluation_s / 2)
    # 20 examples, 120 tokens of their own through 100 million parameters: 0.5 TFLOP, of 33 GFLOP/s
    assert slow.evaluation_s == pytest.approx(0.5e12 / 33e9 / cpu_cost.SERVED, rel=0.1)


@given(st.lists(st.integers(0, 3), max_size=6), st.lists(st.lists(st.integers(0, 3), max_size=4), min_size=1, max_size=4))
def test_what_prompts_share_is_their_beginning(start: list[int], ends: list[list[int]]) -> None:
    prompts = [[*start, *end] for end in ends]
    shared = count_shared(prompts)
    assert shared >= len(start)
    assert all(prompt[:shared] == prompts[0][:shared] for prompt in prompts)
    longer = [prompt[: shared + 1] for prompt in prompts]
    assert any(prompt != longer[0] for prompt in longer) or min(map(len, prompts)) == shared


def test_too_little_memory_and_too_much_time_are_told_and_enough_is_not() -> None:
    small = CpuCost(SLOW, 40.0, 200.0, needed_gib=9.0, free_gib=8.0)
    server = config(server={"count": 2}).student_server
    assert (
        "float32 (a product of matrices on one core: 40 GFLOP/s in float32, 0.8 in bfloat16)"
        in describe_cost(small, server)[0]
    )
    assert "about 40 s for an evaluation on the valset, 3 min for a fine-tune" in describe_cost(small, server)[1]
    assert "2 servers and as many trainings need about 9 GiB; 8 GiB are free" in describe_cost(small, server)[2]
    assert len(describe_cost(replace(small, free_gib=16.0), server)) == 2
    slow = replace(small, free_gib=16.0, training_s=3 * 3600.0)
    assert describe_cost(slow, server)[2].startswith("warning: a fine-tune takes hours here")


@pytest.mark.parametrize(("seconds", "words"), [(0.2, "1 s"), (34, "30 s"), (100, "2 min"), (4000, "67 min"), (9000, "2 h")])
def test_times_are_rough(seconds: float, words: str) -> None:
    assert in_words(seconds) == words
    assert in_words(math.nextafter(seconds, 0)) == words


def test_no_sweep_fails_for_an_estimate_and_none_is_made_for_servers_elsewhere(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bt_ray.slot.base_models import base_weights

    base, here = base_weights(str(model), {}), config(model=str(model))

    class Odd(dspy.ChatAdapter):  # type: ignore[misc]
        def format(self, *_: Any, **__: Any) -> Any:
            raise KeyError("nobody expects this")

    with dspy.context(adapter=Odd()):
        assert describe_here(here, task(), [base], None) == []
    measured: Callable[..., Any] = lambda *_: pytest.fail("measured for nothing")  # noqa: E731
    monkeypatch.setattr(cpu_cost, "cpu_arithmetic", measured)
    monkeypatch.setattr(cpu_cost, "read_prompts", measured)
    assert describe_here(here, task(), [base], "ray://head:10001") == []
    assert describe_here(config(model=str(model), server={"gpus": 1}), task(), [base], None) == []
    assert describe_here(here, task(), [], None) == []

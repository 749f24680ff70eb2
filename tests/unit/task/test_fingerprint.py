"""Keys: equal inputs have equal ones wherever they are computed, any change has another."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.teleprompt import GEPA, BootstrapFewShotWithRandomSearch, BootstrapFinetune
from hypothesis import given
from hypothesis import strategies as st
from support import tasks

import bt_ray
from bt_ray.settings.config import SweepConfig, make_config
from bt_ray.step import StepKey
from bt_ray.task.fingerprint import digest, step_keys
from bt_ray.task.task import StepContext
from bt_ray.weights import Weights

PREFIXES = ["p", "w", "p -> w", "w -> p"]
CONFIG = make_config({"task": "m:f", "model": "org/m", "strategies": ["p -> w", "w -> p"]})
BASE = Weights("base", "org/m")
LM = dspy.LM("openai/base", temperature=0.0, api_key="secret")


def keys(task: bt_ray.Task | None = None, config: SweepConfig = CONFIG, base: Weights = BASE) -> dict[str, StepKey]:
    return step_keys(
        task or tasks.double(),
        config,
        base,
        PREFIXES,
        lambda prefix: StepContext(prefix, seed=len(prefix), scratch_dir=Path(f"/somewhere/{os.urandom(4).hex()}"), lm=LM),
    )


def changed(**of_task: Any) -> set[str]:
    """The steps that get another key when the task changes."""
    return differing(keys(), keys(tasks.double(**of_task)))


def differing(before: dict[str, StepKey], after: dict[str, StepKey]) -> set[str]:
    return {prefix for prefix in before if before[prefix].key != after[prefix].key}


def stricter(example: Any, prediction: Any, trace: Any = None) -> bool:
    return bool(example.answer == prediction.answer.strip())


EVERY_STEP = {"", *PREFIXES}


def test_keys_are_those_of_any_other_process_place_and_hash_seed(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); sys.path.insert(0, sys.argv[2])\n"
        "from unit.task.test_fingerprint import keys\n"
        "print(sorted(step.key for step in keys().values()))"
    )
    here = Path(__file__).parents[2]
    for folder in ("unit/task", "support"):
        (tmp_path / "elsewhere" / folder).mkdir(parents=True)
        for file in (here / folder).glob("*.py"):
            text = file.read_text()
            (tmp_path / "elsewhere" / folder / file.name).write_text(f"# moved, and commented\n{text}")
    shown = {
        subprocess.run(
            [sys.executable, "-c", code, str(root), str(here.parent)],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(here.parent)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for root, seed in ((here, "1"), (tmp_path / "elsewhere", "2"))
    }
    assert shown == {f"{sorted(step.key for step in keys().values())}\n"}


@pytest.mark.parametrize(
    "changes",
    [
        {"metric": stricter},
        {"program": dspy.ChainOfThought(tasks.Double)},
        {"program": dspy.Predict(tasks.Double.with_instructions("Double it."))},
        {"program": dspy.Predict(tasks.Double, temperature=0.5)},
        {"valset": tasks.examples(range(19))},
        {"trainset": tasks.examples(range(100, 121))},
    ],
    ids=", ".join,
)
def test_what_the_baseline_depends_on_changes_every_key(changes: dict[str, Any]) -> None:
    if "program" in changes:
        changes["optimizer_compile_args"] = {}
        before = keys(tasks.double(optimizer_compile_args={}))
        assert differing(before, keys(tasks.double(**changes))) == EVERY_STEP
    else:
        assert changed(**changes) == EVERY_STEP


@pytest.mark.parametrize(
    "settings",
    [{"seed": 1}, {"lm": {"temperature": 0.7}}, {"max_errors": 3}, {"shuffle_trainset_between_steps": False}],
    ids=str,
)
def test_settings_that_change_scores_change_every_key(settings: dict[str, Any]) -> None:
    assert differing(keys(), keys(config=make_config({**CONFIG.model_dump(), **settings}))) == EVERY_STEP


def test_another_model_changes_every_key() -> None:
    assert differing(keys(), keys(base=Weights("other", "org/m"))) == EVERY_STEP


def test_resources_change_nothing() -> None:
    settings = {"num_threads": 3, "server": {"count": 3}, "trial": {"cpus": 1}, "strategies": ["p"], "run_dir": "/x"}
    assert differing(keys(), keys(config=make_config({**CONFIG.model_dump(), **settings}))) == set()


def test_training_settings_change_the_steps_that_train_and_what_follows_them() -> None:
    after = keys(config=make_config({**CONFIG.model_dump(), "train": {"epochs": 7}}))
    assert differing(keys(), after) == {"w", "p -> w", "w -> p"}


def optimizers(p: Callable[[], Any]) -> Callable[[StepContext], dict[str, Any]]:
    return lambda ctx: {"p": p(), "w": BootstrapFinetune(metric=tasks.exact), "bad": tasks.Failing()}


def test_an_optimizer_changes_its_steps_and_what_follows_them() -> None:
    one = keys(tasks.double(optimizers=optimizers(lambda: tasks.Demos(2))))
    other = keys(tasks.double(optimizers=optimizers(lambda: tasks.Demos(3))))
    assert differing(one, other) == {"p", "p -> w", "w -> p"}
    assert differing(keys(), changes := keys(tasks.double(teacher=tasks.double().program))) == {"p", "p -> w", "w -> p"}
    assert changes["w"].key == keys()["w"].key, "w has a teacher of its own"


def test_a_further_optimizer_changes_nothing() -> None:
    def more(ctx: StepContext) -> dict[str, Any]:
        return {"more": tasks.Demos(9), "p": tasks.Demos(), "w": BootstrapFinetune(metric=tasks.exact)}

    assert changed(optimizers=more) == set()


def test_dspys_own_optimizers_have_stable_keys() -> None:
    def built(size: int) -> Callable[[], Any]:
        return lambda: BootstrapFewShotWithRandomSearch(metric=tasks.exact, num_candidate_programs=size)

    def gepa(budget: int) -> Callable[[], Any]:
        return lambda: GEPA(metric=tasks.exact, max_metric_calls=budget, reflection_lm=LM)

    for make in (built, gepa):
        first, again, other = (keys(tasks.double(optimizers=optimizers(make(size)))) for size in (3, 3, 4))
        assert differing(first, again) == set()
        assert differing(first, other) == {"p", "p -> w", "w -> p"}


def test_the_scratch_folder_is_no_part_of_a_key() -> None:
    task = tasks.double(
        optimizers=lambda ctx: {
            "p": GEPA(metric=tasks.exact, max_metric_calls=9, reflection_lm=LM, log_dir=str(ctx.scratch_dir)),
            "w": BootstrapFinetune(metric=tasks.exact),
        }
    )
    assert differing(keys(task), keys(task)) == set()


@dataclass
class Limits:
    low: int = 0
    high: int = 9


LIMITS = Limits()


def helper(text: str) -> str:
    return text[LIMITS.low : LIMITS.high]


def by_helper(example: Any, prediction: Any) -> bool:
    return helper(example.answer) == helper(prediction.answer)


def test_a_function_is_what_it_refers_to(monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(by_helper)
    assert digest(by_helper) == before
    monkeypatch.setattr(f"{__name__}.LIMITS", replace(LIMITS, high=8))
    assert digest(by_helper) != before
    monkeypatch.undo()
    monkeypatch.setattr(f"{__name__}.helper", lambda text: text)
    assert digest(by_helper) != before


def test_no_secret_and_no_address_is_part_of_a_key() -> None:
    assert digest(dspy.LM("openai/m", api_key="a", api_base="http://x")) == digest(dspy.LM("openai/m", api_key="b"))
    assert digest(dspy.LM("openai/m", temperature=0)) != digest(dspy.LM("openai/m", temperature=1))


def test_a_cycle_ends() -> None:
    around: list[Any] = [1]
    around.append(around)
    assert digest(around) == digest(around)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner) | st.frozensets(st.text()),
    max_leaves=8,
)


def same(one: Any, other: Any) -> bool:
    """Equality that tells `True` from `1`, `1` from `1.0` and a list from a tuple."""
    if type(one) is not type(other):
        return False
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return repr(one) == repr(other) if isinstance(one, float) else bool(one == other)


@given(VALUES, VALUES)
def test_digests_are_equal_exactly_where_values_are(one: Any, other: Any) -> None:
    assert (digest(one) == digest(other)) == same(one, other)

"""What `dspy.BetterTogether` refuses, DSPy's error first: bt_ray refuses it before a sweep starts, or goes on on purpose."""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import dspy
import pytest
from dspy.teleprompt import GEPA, BootstrapFewShot
from support import known
from support.both_sides import both, by_bt_ray, by_dspy, told
from support.known import Known, OnlyTrainset, Pair, Told, skill

from bt_ray.driver.check import Checked, check_sweep
from bt_ray.errors import BtRayError, TaskError
from bt_ray.settings.config import make_config
from bt_ray.task.task import Task
from bt_ray.trial.lm import ServedLM


@pytest.fixture
def check(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Checked]:
    """What `bt-ray check` does with a task and settings."""

    def checked(make: Callable[[], Task], strategy: str, **changed: Any) -> Checked:
        module = ModuleType("task_of_the_test")
        module.build = make  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        values = {**settings, "task": f"{module.__name__}:build", "strategies": [strategy], **changed}
        return check_sweep(make_config(values), None).first

    return checked


@pytest.fixture
def refusal(check: Callable[..., Checked]) -> Callable[..., str]:
    """What `bt-ray check` says to a task and settings that it refuses."""

    def refused(*sweep: Any, **changed: Any) -> str:
        with pytest.raises(BtRayError) as caught:
            check(*sweep, **changed)
        return str(caught.value)

    return refused


def compiled() -> dspy.Module:
    program = Known()
    program._compiled = True
    return program


@pytest.mark.parametrize(
    ("task", "strategy", "arguments", "error", "of_dspy", "of_bt_ray"),
    [
        ({"program": compiled}, "a", {}, ValueError, "should not be compiled", "the program is compiled already"),
        ({"trainset": list}, "a", {}, ValueError, "trainset cannot be empty", "trainset is empty"),
        ({}, "a", {"valset_ratio": 1}, ValueError, "must be in range [0, 1), got 1", "Input should be less than 1"),
        ({}, "a", {"valset_ratio": 1.5}, ValueError, "must be in range [0, 1), got 1.5", "Input should be less than 1"),
        ({}, "a", {"valset_ratio": -0.1}, ValueError, "range [0, 1), got -0.1", "should be greater than or equal to 0"),
        # The docstring has None for "no validation", the code compares it with 0.
        ({}, "a", {"valset_ratio": None}, TypeError, "'<' not supported", "valset_ratio: Input should be a valid number"),
        ({}, "", {}, ValueError, "strategy cannot be empty", "A strategy is empty"),
        ({}, "  ", {}, ValueError, "strategy cannot be empty", "A strategy is empty"),
        ({}, "a -> x", {}, ValueError, "invalid optimizer keys: ['x']", "the task has no optimizer 'x'"),
        ({}, "a->b", {}, ValueError, "invalid optimizer keys: ['a->b']", 'write "a -> b"'),
        ({}, "a -> ", {}, ValueError, "invalid optimizer keys: ['']", 'write "a"'),
        ({}, "A", {}, ValueError, "invalid optimizer keys: ['A']", "the task has no optimizer 'A'"),
        (
            {"optimizer_compile_args": lambda: {"x": {"extra": 1}}},
            *("a", {}, ValueError, "Invalid optimizer key 'x'", "optimizer_compile_args has key 'x'"),
        ),
        (
            # Documented as a TypeError.
            {"optimizer_compile_args": lambda: {"a": {"student": Known()}}},
            *("a", {}, ValueError, "'student' is not allowed", "BetterTogether passes the student itself"),
        ),
        (
            {"optimizer_compile_args": lambda: {"a": {"valset": []}}},
            *("a", {}, ValueError, "Invalid compile arguments for optimizer 'a': ['valset']", "takes no 'valset'"),
        ),
        (
            # Also where the strategy leaves the optimizer out.
            {"optimizer_compile_args": lambda: {"b": {"trainste": []}}},
            *("a", {}, ValueError, "Invalid compile arguments for optimizer 'b'", "Did you mean 'trainset'?"),
        ),
    ],
)
def test_what_compile_refuses_is_refused_before_a_sweep_starts(
    lm: ServedLM,
    refusal: Callable[..., str],
    task: dict[str, Callable[[], Any]],
    strategy: str,
    arguments: dict[str, Any],
    error: type[Exception],
    of_dspy: str,
    of_bt_ray: str,
) -> None:
    def make() -> Task:
        return known.task(**{name: value() for name, value in task.items()})

    with pytest.raises(error) as theirs:
        by_dspy(make(), lm, strategy, **arguments)
    assert of_dspy in str(theirs.value)
    assert of_bt_ray in refusal(make, strategy, **arguments)

    # Past the check, bt_ray's class is as strict as DSPy's.
    with pytest.raises(error) as ours:
        by_bt_ray(make(), lm, strategy, **arguments)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize(
    ("optimizers", "of_dspy", "of_bt_ray"),
    [
        (lambda: {"a": "BootstrapFewShot"}, "'a' must be a Teleprompter, got str", "must be a DSPy optimizer"),
        (lambda: {"a": BootstrapFewShot}, "'a' must be a Teleprompter, got type", "must be a DSPy optimizer"),
        (lambda: {"a": skill(4), "b": None}, "'b' must be a Teleprompter, got NoneType", "optimizers(ctx)['b'] must be"),
        (
            lambda: {"a": skill(4), "metric": skill(5)},
            "got multiple values for",
            "'metric' is an argument of BetterTogether",
        ),
        (lambda: {"a": skill(4), "self": skill(5)}, "got multiple values for", "'self' is an argument of"),
        (lambda: {"a": skill(4), 1: skill(5)}, "keywords must be strings", "has the key 1: keys must be strings"),
    ],
    ids=["a name", "a class", "nothing", "metric", "self", "a number"],
)
def test_what_the_constructor_refuses_is_refused_before_a_sweep_starts(
    lm: ServedLM, refusal: Callable[..., str], optimizers: Callable[[], dict[Any, Any]], of_dspy: str, of_bt_ray: str
) -> None:
    def make() -> Task:
        return known.task(optimizers=lambda ctx: optimizers())

    with pytest.raises(TypeError, match=of_dspy):
        by_dspy(make(), lm, "a")
    assert of_bt_ray in refusal(make, "a")
    with pytest.raises(TaskError) as ours:
        by_bt_ray(make(), lm, "a")
    assert of_bt_ray in str(ours.value)


@pytest.mark.parametrize("key", ["a/b", "..", "."])
def test_an_optimizers_key_may_be_a_path_in_dspy_and_not_here_where_folders_are_named_after_it(
    lm: ServedLM, refusal: Callable[..., str], key: str
) -> None:
    def make() -> Task:
        return known.task(optimizers=lambda ctx: {key: skill(4)})

    assert not by_dspy(make(), lm, key).flag_compilation_error_occurred
    assert f"has the key {key!r}: a step's folder is named after it" in refusal(make, key)


def test_predictors_without_an_lm_are_refused_by_dspy_and_get_the_sweeps_model_here(
    lm: ServedLM, check: Callable[..., Checked]
) -> None:
    # DSPy wants LMs to be assigned, whatever its settings say.
    pair = Pair()
    pair.second.lm = lm
    optimizer = dspy.BetterTogether(metric=known.exact, a=skill(4))
    with dspy.context(lm=lm), pytest.raises(ValueError, match=r"must have a language model set.*\['predict'\]"):
        optimizer.compile(pair, trainset=known.examples(range(4)), strategy="a")

    # A sweep assigns its own, as it says.
    assert [f"openai/{base}" for base in check(lambda: known.task(program=Pair()), "a").bases] == [lm.model]


# Teachers


class Elsewhere(dspy.Module):  # type: ignore[misc]
    """One predictor, under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.other = dspy.Predict(known.Double)


@pytest.mark.parametrize(
    ("teacher", "of_dspy"),
    [(Pair, "the same number of predictors.*1 != 2"), (Elsewhere, "'predict' != 'other'")],
)
def test_a_teacher_of_another_structure_is_refused(
    lm: ServedLM, refusal: Callable[..., str], teacher: type[dspy.Module], of_dspy: str
) -> None:
    with pytest.raises(AssertionError, match=of_dspy):
        by_dspy(told(teacher=teacher())([]), lm, "t")
    assert "the teacher's predictors are" in refusal(lambda: told(teacher=teacher())([]), "t")


def test_no_teacher_is_given_where_the_list_of_them_is_empty(lm: ServedLM) -> None:
    theirs, _ = both(lm, "t", told(teacher=[]))
    assert theirs.seen[0]["teacher"] is None


def test_a_teacher_reaches_those_that_take_one_as_a_list_in_dspy_and_as_it_is_here(lm: ServedLM) -> None:
    # Why: `test_a_teacher_reaches_each_optimizer_in_the_form_that_it_takes`.
    theirs: list[Any] = []
    ours: list[Any] = []
    for walk, seen in ((by_dspy, theirs), (by_bt_ray, ours)):
        task = known.task(
            teacher=Known(skill=9), optimizers=lambda ctx, seen=seen: {"t": Told(seen), "o": OnlyTrainset(seen)}
        )
        walk(task, lm, "t -> o", num_threads=1)
    assert [given.get("teacher") for given in theirs] == [[9], None]
    assert [given.get("teacher") for given in ours] == [9, None]


def test_several_teachers_reach_every_optimizer_in_dspy_and_are_refused_here_where_one_takes_one(
    lm: ServedLM, refusal: Callable[..., str]
) -> None:
    teachers = [Known(skill=9), Known(skill=8)]
    seen: list[Any] = []
    by_dspy(told(teacher=teachers)(seen), lm, "t", num_threads=1)
    assert seen[0]["teacher"] == [9, 8]
    assert "has 2 teachers, and optimizer 't' takes one" in refusal(lambda: told(teacher=teachers)([]), "t")


def test_a_program_may_not_teach_itself_in_dspy_and_may_here(lm: ServedLM) -> None:
    program = Known()
    with pytest.raises(AssertionError, match=r"share the following predictor\(s\)"):
        by_dspy(told(program=program, teacher=program)([]), lm, "t")

    seen: list[Any] = []
    assert not by_bt_ray(told(program=program, teacher=program)(seen), lm, "a -> t").flag_compilation_error_occurred
    assert seen[0]["teacher"] == 2, "the program as the task has it"


def test_a_teacher_beside_gepa_is_refused_by_dspy_and_kept_from_it_here(lm: ServedLM) -> None:
    def metric(example: Any, prediction: Any, trace: Any = None, pred_name: Any = None, pred_trace: Any = None) -> bool:
        return known.exact(example, prediction)

    def task(seen: list[Any]) -> Task:
        return known.task(
            metric=metric,
            teacher=Known(skill=9),
            optimizers=lambda ctx: {
                "g": GEPA(metric=metric, max_metric_calls=20, instruction_proposer=unused),
                "t": Told(seen),
            },
            optimizer_compile_args={"g": {"valset": known.examples(range(20))}},
        )

    with pytest.raises(ValueError, match="GEPA does not accept a teacher argument"):
        by_dspy(task([]), lm, "g -> t")

    seen: list[Any] = []
    assert not by_bt_ray(task(seen), lm, "g -> t").flag_compilation_error_occurred
    assert seen[0]["teacher"] == 9


def unused(*args: Any, **named: Any) -> dict[str, str]:
    raise AssertionError("the budget is spent before")

"""The rules that `dspy.BetterTogether` documents hold: each test gives DSPy's class and bt_ray's the same input.

Most programs here need no model (`support.known`), and no test needs Ray. `test_dspy_refusals.py` has what DSPy refuses,
`test_parity_with_dspy.py` compares whole walks with a model.
"""

import inspect
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.teleprompt import BootstrapFinetune
from dspy.teleprompt.teleprompt import Teleprompter
from support import known, tasks
from support.both_sides import Result, both, by_bt_ray, by_dspy, skills, told
from support.known import Becomes, Known, Noting, OnlyTrainset, Pair, Told, skill

from bt_ray.errors import TaskError
from bt_ray.settings.config import SweepConfig, make_config
from bt_ray.strategy import SEPARATOR
from bt_ray.task.task import StepContext, Task
from bt_ray.trial.lm import ServedLM, ServedProvider

# What runs, and in which order


def test_optimizers_run_in_the_order_of_the_strategy_each_on_the_program_of_the_one_before(lm: ServedLM) -> None:
    def make(seen: list[Any]) -> Task:
        return known.task(optimizers=lambda ctx: {"add": Becomes(lambda n: n + 1), "double": Becomes(lambda n: 2 * n)})

    theirs, _ = both(lm, "add -> double -> add", make)
    assert theirs.result.candidates == [
        ("add -> double -> add", 70.0, 7),
        ("add -> double", 60.0, 6),
        ("add", 30.0, 3),
        ("", 20.0, 2),
    ]


def test_strategies_are_separated_as_dspy_separates_them() -> None:
    assert SEPARATOR == dspy.BetterTogether.STRAT_SEP


def test_the_defaults_of_settings_are_dspys() -> None:
    parameters = inspect.signature(dspy.BetterTogether.compile).parameters
    of_the_task = {"self", "student", "trainset", "valset", "teacher", "optimizer_compile_args"}
    without_default_here = {"strategy"}
    of_a_sweep = {"seed": 0, "num_threads": 16}  # equal prefixes are equal steps; servers answer in batches
    config = make_config({"task": "m:f", "model": "org/m", "strategies": ["p"]})
    for name in set(parameters) - of_the_task - without_default_here - set(of_a_sweep):
        assert getattr(config, name) == parameters[name].default, name
    for name, default in of_a_sweep.items():
        assert parameters[name].default is None
        assert getattr(config, name) == default
    assert SweepConfig.model_fields["strategies"].is_required()


def test_without_optimizers_of_ones_own_p_and_w_are_dspys(lm: ServedLM, tmp_path: Path) -> None:
    theirs = dspy.BetterTogether(metric=known.exact).optimizers
    ours = known.task(optimizers=None).build_optimizers(StepContext("", 0, tmp_path, lm))
    assert list(ours) == list(theirs) == ["p", "w"]
    for key, optimizer in ours.items():
        assert type(optimizer) is type(theirs[key])
        assert plain(optimizer) == plain(theirs[key])
        assert inspect.unwrap(optimizer.metric) is known.exact


def plain(optimizer: Teleprompter) -> dict[str, Any]:
    """The optimizer's arguments, as far as they are plain values."""
    return {name: value for name, value in vars(optimizer).items() if isinstance(value, int | float | str | dict | None)}


# What is returned


def test_all_programs_are_listed_the_baseline_too_the_best_first_and_the_best_is_returned(lm: ServedLM) -> None:
    sides = both(lm, "a -> b -> c", skills(a=5, b=8, c=1))
    for side in sides:
        assert side.result == Result(
            returned="a -> b",
            candidates=[("a -> b", 80.0, 8), ("a", 50.0, 5), ("", 20.0, 2), ("a -> b -> c", 10.0, 1)],
            failed=False,
        )
        assert all(set(candidate) == {"program", "score", "strategy"} for candidate in side.program.candidate_programs)
        assert len({id(candidate["program"]) for candidate in side.program.candidate_programs}) == 4


def test_the_returned_program_counts_as_compiled_and_is_not_the_one_that_was_given(lm: ServedLM) -> None:
    given: list[dspy.Module] = []

    def make(seen: list[Any]) -> Task:
        made = skills(a=5)(seen)
        given.append(made.program)
        return made

    for side, program in zip(both(lm, "a", make), given, strict=True):
        assert side.program._compiled
        assert side.program is not program


@pytest.mark.parametrize(
    ("outcomes", "returned"),
    [
        ({"a": 2, "b": 2}, ""),
        ({"a": 4, "b": 4}, "a"),
        ({"a": 3, "b": 4, "c": 4, "d": 4}, "a -> b"),
        ({"a": 4, "b": 2, "c": 4}, "a"),
    ],
    ids=str,
)
def test_a_tie_goes_to_the_earlier_program(lm: ServedLM, outcomes: dict[str, int], returned: str) -> None:
    theirs, ours = both(lm, SEPARATOR.join(outcomes), skills(**outcomes))
    assert ours.result.returned == theirs.result.returned == returned


@pytest.mark.parametrize(
    ("strategy", "returned", "listed"),
    [
        ("bad -> a", "", [""]),
        ("a -> bad -> b", "a", ["a", ""]),
        ("a -> b -> bad", "a", ["a", "a -> b", ""]),
        ("b -> a -> nothing -> b", "b -> a", ["b -> a", "b", ""]),
    ],
)
def test_a_step_that_fails_ends_the_strategy_with_the_best_so_far_and_a_flag(
    lm: ServedLM, strategy: str, returned: str, listed: list[str]
) -> None:
    def make(seen: list[Any]) -> Task:
        return known.task(
            optimizers=lambda ctx: {"a": skill(5), "b": skill(3), "bad": tasks.Failing(), "nothing": Nothing()}
        )

    theirs, _ = both(lm, strategy, make)
    assert theirs.result.failed
    assert theirs.result.returned == returned
    assert [prefix for prefix, _, _ in theirs.result.candidates] == listed


class Nothing(Teleprompter):  # type: ignore[misc]
    """Forgets to return a program."""

    def compile(self, student: dspy.Module, *, trainset: list[dspy.Example]) -> None: ...


def test_without_validation_a_step_that_fails_ends_the_strategy_with_the_latest_program(lm: ServedLM) -> None:
    def make(seen: list[Any]) -> Task:
        return known.task(valset=None, optimizers=lambda ctx: {"a": skill(5), "b": skill(3), "bad": tasks.Failing()})

    theirs, _ = both(lm, "a -> b -> bad -> a", make, valset_ratio=0)
    assert theirs.result.failed
    assert theirs.result.returned == "a -> b"


@pytest.mark.parametrize("walk", [by_dspy, by_bt_ray])
def test_an_interrupt_is_no_failed_step(lm: ServedLM, walk: Callable[..., dspy.Module]) -> None:
    class Interrupted(Teleprompter):  # type: ignore[misc]
        def compile(self, student: dspy.Module, *, trainset: list[dspy.Example]) -> dspy.Module:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        walk(known.task(optimizers=lambda ctx: {"a": skill(5), "stop": Interrupted()}), lm, "a -> stop", num_threads=1)


# Validation


def test_a_valset_is_used_as_it_is_given_and_its_ratio_ignored(lm: ServedLM) -> None:
    theirs, _ = both(lm, "a -> b -> t", told(), valset_ratio=0.5)
    assert theirs.result.returned == "a"
    (seen,) = theirs.seen
    assert len(seen["trainset"]) == 20
    assert seen["valset"] == [f"number {n}" for n in range(20)]


@pytest.mark.parametrize("valset", [None, []], ids=["none", "empty"])
@pytest.mark.parametrize(("ratio", "held_out"), [({}, 2), ({"valset_ratio": 0.29}, 5)], ids=str)
def test_without_a_valset_the_first_examples_of_the_trainset_are_held_out_by_their_ratio(
    lm: ServedLM, valset: Any, ratio: dict[str, float], held_out: int
) -> None:
    theirs, _ = both(lm, "t -> b -> a", told(valset=valset), shuffle_trainset_between_steps=False, **ratio)
    questions = [f"number {n}" for n in range(100, 120)]
    assert theirs.seen == [
        {"trainset": questions[held_out:], "teacher": None, "valset": questions[:held_out], "extra": None}
    ]
    assert theirs.result.returned == ("" if held_out == 2 else "t -> b -> a"), "all programs answer 100 and 101 right"


@pytest.mark.parametrize(
    ("numbers", "ratio", "valset"), [(20, 0, None), (9, 0.1, []), (2, 0.4, [])], ids=["off", "too small", "tiny"]
)
def test_without_validation_nothing_is_scored_and_the_latest_program_is_returned(
    lm: ServedLM, numbers: int, ratio: float, valset: list[str] | None
) -> None:
    trainset = known.examples(range(100, 100 + numbers))
    theirs, _ = both(lm, "a -> t -> b", told(trainset=trainset, valset=None), valset_ratio=ratio)
    assert theirs.result.candidates == [("", None, 2), ("a", None, 6), ("a -> t", None, 6), ("a -> t -> b", None, 3)]
    assert theirs.result.returned == "a -> t -> b"
    assert len(theirs.seen[0]["trainset"]) == numbers
    assert theirs.seen[0]["valset"] == valset


# What optimizers are given


@pytest.mark.parametrize("seed", [0, 1, 20])
@pytest.mark.parametrize("arguments", [{}, {"shuffle_trainset_between_steps": False}, {"valset_ratio": 0.25}], ids=str)
def test_the_trainset_is_shuffled_before_each_step_by_the_seed_or_not_at_all(
    lm: ServedLM, seed: int, arguments: dict[str, Any]
) -> None:
    given: list[list[dspy.Example]] = []

    def make(seen: list[Any]) -> Task:
        given.append(known.examples(range(100, 120)))
        return told(trainset=given[-1], valset=None if arguments.get("valset_ratio") else known.examples(range(5)))(seen)

    theirs, _ = both(lm, "t -> t -> t", make, seed=seed, **arguments)
    orders = [seen["trainset"] for seen in theirs.seen]
    assert len({tuple(sorted(order)) for order in orders}) == 1, "each step has all examples"
    assert len({tuple(order) for order in orders}) == (1 if arguments.get("shuffle_trainset_between_steps") is False else 3)
    for trainset in given:
        assert trainset == known.examples(range(100, 120)), "the caller's list stays as it is"


def test_another_seed_gives_another_order_and_the_same_seed_the_same(lm: ServedLM) -> None:
    one, other, again = (both(lm, "t", told(), seed=seed)[1].seen for seed in (1, 2, 1))
    assert one == again != other


class OnlyStudent(Noting):
    def compile(self, student: dspy.Module) -> dspy.Module:
        self.note()
        return student


class Anything(Noting):
    def compile(self, student: dspy.Module, **given: Any) -> dspy.Module:
        self.note(**given)
        return student


@pytest.mark.parametrize(
    ("optimizer", "names"),
    [
        (Told, ["trainset", "teacher", "valset", "extra"]),
        (OnlyTrainset, ["trainset"]),
        (OnlyStudent, []),
        (Anything, []),
    ],
)
def test_an_optimizer_is_given_what_its_signature_names(lm: ServedLM, optimizer: type[Noting], names: list[str]) -> None:
    theirs, _ = both(lm, "t", lambda seen: known.task(optimizers=lambda ctx: {"t": optimizer(seen)}))
    (seen,) = theirs.seen
    assert list(seen) == names


@pytest.mark.parametrize(
    ("arguments", "changed"),
    [
        (lambda: {"extra": 3}, {"extra": 3}),
        (lambda: {"trainset": known.examples(range(3))}, {"trainset": ["number 0", "number 1", "number 2"]}),
        (lambda: {"valset": known.examples(range(1))}, {"valset": ["number 0"]}),
        (lambda: {"teacher": Known(skill=9)}, {"teacher": 9}),
        (lambda: {"teacher": None}, {}),
    ],
    ids=["extra", "trainset", "valset", "teacher", "no teacher"],
)
def test_compile_args_add_to_what_one_optimizer_is_given_or_take_its_place(
    lm: ServedLM, arguments: Callable[[], dict[str, Any]], changed: dict[str, Any]
) -> None:
    theirs, _ = both(lm, "t -> u", told(optimizer_compile_args={"t": arguments()}), shuffle_trainset_between_steps=False)
    named, other = theirs.seen
    assert other["extra"] is None
    assert named == {**other, **changed}
    assert theirs.result.candidates[0][1] == 20.0, "the valset that scores is BetterTogether's"


class Forgetful(Teleprompter):  # type: ignore[misc]
    """Loses LMs, as prompt optimizers do that work on copies."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def compile(self, student: dspy.Module, *, trainset: list[dspy.Example]) -> dspy.Module:
        for name, predictor in student.named_predictors():
            if name in self.names:
                predictor.lm = None
        return student


@pytest.mark.parametrize("names", [("predict",), ("second",), ("predict", "second")], ids=str)
def test_an_lm_that_an_optimizer_lost_is_restored_for_the_next_one_and_in_the_result(
    lm: ServedLM, names: tuple[str, ...]
) -> None:
    class Asks(Teleprompter):  # type: ignore[misc]
        def __init__(self, seen: list[Any]) -> None:
            self.seen = seen

        def compile(self, student: dspy.Module, *, trainset: list[dspy.Example]) -> dspy.Module:
            self.seen.append([predictor.lm is lm for predictor in student.predictors()])
            return student

    def make(seen: list[Any]) -> Task:
        return known.task(program=Pair(), optimizers=lambda ctx: {"lose": Forgetful(*names), "ask": Asks(seen)})

    theirs, ours = both(lm, "lose -> ask", make)
    assert theirs.seen == [[True, True]]
    for side in (theirs, ours):
        for candidate in side.program.candidate_programs:
            assert [predictor.lm.model for predictor in candidate["program"].predictors()] == [lm.model, lm.model]


@pytest.mark.parametrize("strategy", ["p", "w", "w -> p", "p -> w -> bad"])
def test_models_are_launched_once_relaunched_after_a_fine_tune_and_killed_at_the_end(
    lm: ServedLM, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, str]] = []
    for name in ("launch", "kill", "finetune"):
        monkeypatch.setattr(ServedProvider, name, noting(events, name, getattr(ServedProvider, name)))

    def lifecycle() -> list[tuple[str, int]]:
        """What happened since the last call, to the base model, 0, or its first fine-tune, 1."""
        models = list(dict.fromkeys(model for _, model in events))
        happened = [(name, models.index(model)) for name, model in events]
        events.clear()
        return happened

    def task() -> Task:
        return tasks.double(program=Asking(), optimizer_compile_args={}, optimizers=p_w_and_bad)

    by_dspy(task(), lm, strategy)
    theirs = lifecycle()
    by_bt_ray(task(), lm, strategy)
    assert lifecycle() == theirs
    trained = [("kill", 0), ("finetune", 0), ("launch", 1)] if "w" in strategy else []
    assert theirs == [("launch", 0), *trained, ("kill", 1 if trained else 0)]


def noting(events: list[tuple[str, str]], name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def noted(self: ServedProvider, *args: Any, **named: Any) -> Any:
        events.append((name, named["model"] if name == "finetune" else args[0].model))
        return call(self, *args, **named)

    return noted


class Asking(dspy.Module):  # type: ignore[misc]
    """Two predictors with one LM."""

    def __init__(self) -> None:
        super().__init__()
        self.first = dspy.Predict(tasks.Double)
        self.second = dspy.Predict(tasks.Double)

    def forward(self, question: str) -> dspy.Prediction:
        self.first(question=question)
        return self.second(question=question)


def p_w_and_bad(ctx: StepContext) -> dict[str, Teleprompter]:
    return {"p": tasks.Demos(), "w": BootstrapFinetune(metric=tasks.exact), "bad": tasks.Failing()}


# How programs are evaluated


def graded(example: dspy.Example, prediction: dspy.Prediction) -> Any:
    return dspy.Prediction(score=0.25 + known.exact(example, prediction) / 2, feedback="as well as one can")


@pytest.mark.parametrize(
    ("metric", "baseline"),
    [
        (known.exact, 20.0),
        (lambda example, prediction: 3 * known.exact(example, prediction), 60.0),
        (lambda example, prediction: known.exact(example, prediction) / 3, 6.67),
        (lambda example, prediction: known.exact(example, prediction) - 1, -80.0),
        (graded, 35.0),
    ],
    ids=["bool", "int", "rounded", "negative", "prediction"],
)
def test_any_number_is_a_score_and_the_higher_is_the_better(
    lm: ServedLM, metric: Callable[..., Any], baseline: float
) -> None:
    def make(seen: list[Any]) -> Task:
        return known.task(metric=metric, optimizers=lambda ctx: {"a": skill(1), "b": skill(7), "c": skill(3)})

    theirs, _ = both(lm, "a -> b -> c", make)
    assert [prefix for prefix, _, _ in theirs.result.candidates] == ["a -> b", "a -> b -> c", "", "a"]
    assert theirs.result.candidates[2][1] == baseline


@pytest.mark.parametrize(("asked", "ambient", "at_once"), [(1, 5, 1), (4, 5, 4), (None, 5, 5), (None, 1, 1)])
def test_an_evaluation_has_as_many_threads_as_are_asked_for_or_dspys_setting(
    lm: ServedLM, asked: int | None, ambient: int, at_once: int
) -> None:
    def make(seen: list[Any]) -> Task:
        gate, lock = threading.Barrier(at_once), threading.Lock()
        active: list[str] = []

        def together(example: dspy.Example, prediction: dspy.Prediction) -> bool:
            with lock:
                active.append(example.question)
                seen.append(len(active))
            gate.wait(timeout=20)
            with lock:
                active.remove(example.question)
            return known.exact(example, prediction)

        return known.task(metric=together)

    for walk in (by_dspy, by_bt_ray):
        seen: list[int] = []
        with dspy.context(num_threads=ambient):
            walk(make(seen), lm, "a", num_threads=asked)
        assert max(seen) == at_once


@pytest.mark.parametrize(("asked", "ambient"), [(4, 1), (None, 4)])
def test_fewer_failed_examples_than_max_errors_score_0_each(lm: ServedLM, asked: int | None, ambient: int) -> None:
    with dspy.context(max_errors=ambient):
        theirs, _ = both(lm, "a", lambda seen: known.task(metric=known.failing_metric(17)), max_errors=asked)
    assert theirs.result.candidates == [("a", 40.0, 4), ("", 20.0, 2)]


@pytest.mark.parametrize(("asked", "ambient"), [(3, 100), (None, 3)])
def test_as_many_as_max_errors_are_a_score_of_0_for_dspy_and_an_error_here(
    lm: ServedLM, asked: int | None, ambient: int
) -> None:
    # The same difference as in `test_an_evaluation_that_fails_as_a_whole_is_an_error`; the limit is DSPy's.
    with dspy.context(max_errors=ambient):
        program = by_dspy(known.task(metric=known.failing_metric(17)), lm, "a", num_threads=1, max_errors=asked)
        assert {candidate["score"] for candidate in program.candidate_programs} == {0.0}
        with pytest.raises(TaskError, match=r"stopped after 3 failed examples \(max_errors\).*set max_errors higher"):
            by_bt_ray(known.task(metric=known.failing_metric(17)), lm, "a", num_threads=1, max_errors=asked)


@pytest.mark.parametrize(
    ("asked", "ambient", "shown"), [(True, False, 2), (False, True, 0), (None, True, 2), (None, False, 0)]
)
def test_tracebacks_of_failed_examples_are_logged_if_asked_for(
    lm: ServedLM, asked: bool | None, ambient: bool, shown: int
) -> None:
    for walk in (by_dspy, by_bt_ray):
        with logged("dspy.utils.parallelizer") as messages, dspy.context(provide_traceback=ambient):
            walk(known.task(metric=known.failing_metric(19)), lm, "a", num_threads=1, provide_traceback=asked)
        assert len(messages) == 2, "one for the baseline, one for the step"
        assert sum("KeyError" in message and "in metric" in message for message in messages) == shown


def test_the_log_tells_the_steps_and_calls_the_same_ones_a_new_best(lm: ServedLM) -> None:
    logs = []
    for walk in (by_dspy, by_bt_ray):
        with logged("dspy.teleprompt.bettertogether") as messages:
            walk(skills(a=1, b=4, c=4, d=3)([]), lm, "a -> b -> c -> d -> bad", num_threads=1)
        logs.append([message for message in messages if any(word in message for word in ("core", "STEP", "fail", "Best"))])
    theirs, ours = logs
    assert ours == theirs
    assert [message.split("!")[0][-14:] for message in theirs if "(strategy:" in message] == ["New best score"] * 2


@contextmanager
def logged(name: str) -> Iterator[list[str]]:
    """What the logger says. DSPy's do not hand on to other loggers' handlers what they log."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)

"""How whole sweeps hold examples out, order them, and evaluate, as the settings say; where DSPy has a say, as DSPy does.

Most programs here need no model, so that no server starts.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import dspy
import pytest
from conftest import SUPPORT
from support import known

import bt_ray
from bt_ray.events import StepFinished
from bt_ray.layout import EXAMPLES
from bt_ray.report.comparison import verdict
from bt_ray.report.data import read_report
from bt_ray.report.page import report_page
from bt_ray.run_dir.examples import KeptExample, read_examples
from bt_ray.run_dir.storage import open_storage
from bt_ray.strategy import prefixes

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A copy of the tasks, beside which trials note what they see."""
    return Path(shutil.copy(SUPPORT / "known.py", tmp_path / "known.py"))


def notes(tasks: Path) -> dict[str, dict[str, Any]]:
    """What trials noted, by step."""
    lines = [json.loads(line) for line in tasks.with_name("noted.jsonl").read_text().splitlines()]
    return {line["prefix"]: line for line in lines}


def by_dspy(strategy: str, seed: int, **arguments: Any) -> tuple[dspy.Module, dict[str, Any]]:
    """What DSPy's class returns, and what it gives to the steps that note it."""
    seen: list[Any] = []
    task = known.task()
    task.program.set_lm(dspy.LM("openai/unused", api_key="none"))
    optimizer = dspy.BetterTogether(known.exact, t=known.Told(seen), a=known.skill(4), b=known.skill(6))
    program = optimizer.compile(task.program, trainset=list(task.trainset), strategy=strategy, seed=seed, **arguments)
    return program, dict(zip((prefix for prefix in prefixes(strategy) if prefix.endswith("t")), seen, strict=True))


@pytest.mark.parametrize(
    ("task", "strategies", "changed"),
    [
        ("noted", ("a -> t -> b -> t", "a -> t -> t"), {"valset_ratio": 0.9, "seed": 5}),
        ("noted_without_valset", ("t -> a -> t", "t -> t"), {"valset_ratio": 0.3, "seed": 5}),
        ("noted_without_valset", ("t -> b -> t",), {"valset_ratio": 0.3, "shuffle_trainset_between_steps": False}),
        ("noted_without_valset", ("b -> t -> a",), {"valset_ratio": 0}),
    ],
    ids=["valset", "ratio", "ratio, unshuffled", "no validation"],
)
def test_examples_are_held_out_and_ordered_and_a_strategys_best_is_chosen_as_dspy_does(
    settings: dict[str, Any], tasks: Path, task: str, strategies: tuple[str, ...], changed: dict[str, Any]
) -> None:
    result = bt_ray.sweep(f"{tasks}:{task}", {**settings, "strategies": strategies, **changed})
    given = {prefix: line["given"] for prefix, line in notes(tasks).items()}
    valset = known.examples(range(20)) if task == "noted" else None
    for trial in result.trials:
        program, theirs = by_dspy(trial.strategy, changed.get("seed", 0), valset=valset, **without_seed(changed))
        assert {prefix: given[prefix] for prefix in theirs} == theirs
        candidates = {candidate["strategy"]: candidate["score"] for candidate in program.candidate_programs}
        assert {candidate.prefix: candidate.score for candidate in trial.candidates} == candidates
        assert trial.best is not None
        (returned,) = [c["strategy"] for c in program.candidate_programs if c["program"] is program]
        assert trial.best.prefix == returned
    evaluated = [number.removeprefix("number ") for number in next(iter(given.values()))["valset"] or ()]
    examples = [KeptExample({"question": f"number {n}"}, {"answer": str(2 * int(n))}) for n in evaluated]
    assert kept_examples(result) == ([examples] if examples else []), "a report can show them"


def kept_examples(result: bt_ray.SweepResult) -> list[list[KeptExample]]:
    """The validation examples that the run directory has for a report, by valset."""
    storage = open_storage(result.run_dir)
    return [list(read_examples(storage, f"{EXAMPLES}/{name}")) for name in storage.names(EXAMPLES)]


def without_seed(changed: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in changed.items() if name != "seed"}


def test_an_evaluation_with_fewer_failed_examples_than_max_errors_goes_on(settings: dict[str, Any], tasks: Path) -> None:
    events: list[Any] = []
    result = bt_ray.sweep(f"{tasks}:three_fail", {**settings, "strategies": ["a"], "max_errors": 4}, listener=events.append)
    (trial,) = result.trials
    assert trial.error is None
    assert [candidate.score for candidate in trial.candidates] == [20.0, 40.0]
    errors = [{"KeyError: 'no such field'": 3}] * 2
    assert [candidate.example_errors for candidate in trial.candidates] == errors
    assert [event.example_errors for event in events if isinstance(event, StepFinished)] == errors


def test_a_metric_that_gives_nan_for_one_example_costs_that_example_alone(settings: dict[str, Any], tasks: Path) -> None:
    result = bt_ray.sweep(f"{tasks}:one_nan", {**settings, "strategies": ["a", "b"]})
    assert [candidate.score for candidate in result.candidates] == [60.0, 40.0, 20.0, 20.0]
    error = {"ValueError: the metric gave nan, which is no score": 1}
    assert all(candidate.example_errors == error for candidate in result.candidates)
    assert result.best is not None
    assert (result.best.prefix, result.best.test_score) == ("b", 60.0)
    assert "number 19" in log_of(result), "the example is named there"
    for file in Path(result.run_dir).rglob("*.json"):
        json.loads(file.read_text(), parse_constant=lambda name, file=file: pytest.fail(f"{file} has {name}"))


def test_variants_with_different_valsets_are_not_compared(settings: dict[str, Any], tasks: Path) -> None:
    space = {"args.first": [0, 5, 0], "seed": [0, 1]}
    result = bt_ray.sweep(f"{tasks}:validated_on", {**settings, "strategies": ["b"], "space": space})
    assert [candidate.score for candidate in result.candidates] == [30.0, 30.0, 10.0, 10.0, 5.0, 5.0, 0.0, 0.0]
    assert result.valsets == 2
    written = bt_ray.SweepResult.read(Path(result.run_dir) / "result.json")
    for found in (verdict(result), verdict(written), read_report(open_storage(result.run_dir)).verdict):
        assert found is not None
        assert [(other.variant, against.wins) for other, against in found.others] == [("args.first=0, seed=1", 0)]
        assert found.incomparable == 2
    page = report_page(read_report(open_storage(result.run_dir)))
    assert "The ranking is over 2 different valsets" in page
    assert "The winner cannot be compared with 2 others, which were validated on other examples." in page


def test_an_evaluation_with_as_many_as_max_errors_ends_as_an_error_that_says_what_to_do(
    settings: dict[str, Any], tasks: Path
) -> None:
    result = bt_ray.sweep(f"{tasks}:three_fail", {**settings, "strategies": ["a"], "max_errors": 3, "num_threads": 1})
    (trial,) = result.trials
    assert trial.candidates == ()
    assert "stopped after 3 failed examples (max_errors): the metric raised" in (trial.error or "")
    assert "The trial's log has them. If the model is only weak, set max_errors higher." in (trial.error or "")
    assert log_of(result).count("'no such field'") == 3


@pytest.mark.parametrize("asked", [True, None])
def test_the_logs_have_the_tracebacks_of_failed_examples_if_they_are_asked_for(
    settings: dict[str, Any], tasks: Path, asked: bool | None
) -> None:
    result = bt_ray.sweep(f"{tasks}:three_fail", {**settings, "strategies": ["a"], "provide_traceback": asked})
    for log, failed in ((log_of(result), 6), (log_of(result, "test-*"), 3)):
        assert log.count("Error for Example") == failed
        assert log.count(", in metric\n") == (failed if asked else 0)
        assert ("Set `provide_traceback=True`" in log) == (not asked)


def log_of(result: bt_ray.SweepResult, trial: str = "000-*") -> str:
    (log,) = Path(result.run_dir).glob(f"trials/{trial}/log.txt")
    return log.read_text()


def test_optimizers_find_the_settings_of_an_evaluation_in_dspys(settings: dict[str, Any], tasks: Path) -> None:
    evaluation = {"num_threads": 3, "max_errors": 7, "provide_traceback": True}
    bt_ray.sweep(f"{tasks}:noted", {**settings, "strategies": ["t"], **evaluation})
    assert {name: notes(tasks)["t"][name] for name in evaluation} == evaluation


def test_as_many_requests_are_in_flight_as_there_are_threads_and_never_more(
    settings: dict[str, Any], request_log: Any
) -> None:
    env = {**settings["server"]["env"], "SCRIPTED_TOGETHER": "4", "SCRIPTED_DELAY_S": "0.02"}
    server = {**settings["server"], "count": 1, "env": env}
    task = f"{SUPPORT / 'tasks.py'}:without_testset"
    result = bt_ray.sweep(task, {**settings, "strategies": ["p"], "num_threads": 4, "server": server})
    assert [candidate.score for candidate in result.trials[0].candidates] == [20.0, 40.0]
    assert len(request_log()) == 40
    assert max(request["in_flight"] for request in request_log()) == 4

"""Programs with several predictors and models, and their teachers, in whole sweeps with scripted servers."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import SUPPORT
from support.scripted_model import write_model

import bt_ray
from bt_ray.slot.base_models import base_weights

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A copy of the tasks, with what they import and the model that they name, which answers `n` right if `n % 10 < 7`."""
    shutil.copy(SUPPORT / "tasks.py", tmp_path)
    write_model(tmp_path / "other", skill=7, tensors=("skill", "layer", "another"))
    return Path(shutil.copy(SUPPORT / "program_tasks.py", tmp_path / "program_tasks.py"))


@pytest.fixture
def other(tasks: Path) -> str:
    return base_weights(str(tasks.with_name("other")), {}).id


def sweep(settings: dict[str, Any], task: str, *strategies: str, **changed: Any) -> bt_ray.SweepResult:
    return bt_ray.sweep(task, {**settings, "strategies": strategies, **changed})


def test_a_larger_model_that_the_pool_serves_teaches(
    settings: dict[str, Any], tasks: Path, other: str, request_log: Any
) -> None:
    result = sweep(settings, f"{tasks}:taught_by_another_model", "w")
    assert [candidate.score for candidate in result.trials[0].candidates] == [20.0, 50.0]
    asked = {request["question"] for request in request_log() if request["weights"] == other}
    assert asked == {str(number) for number in range(100, 120)}, "the trainset, and nothing else"
    (data,) = Path(settings["run_dir"]).glob("trainings/*/*/data.jsonl")
    assert len(data.read_text().splitlines()) == 14, "what the teacher gets right"


def test_several_teachers_teach_one_fine_tune(settings: dict[str, Any], tasks: Path, other: str) -> None:
    result = sweep(settings, f"{tasks}:taught_by_several", "w")
    assert [candidate.score for candidate in result.trials[0].candidates] == [20.0, 50.0]
    (data,) = Path(settings["run_dir"]).glob("trainings/*/*/data.jsonl")
    assert len(data.read_text().splitlines()) == 14 + 4, "what the larger model gets right, and what the student does"


def test_predictors_with_models_of_their_own_are_each_fine_tuned_and_served(
    settings: dict[str, Any], tasks: Path, other: str, model: Path, request_log: Any
) -> None:
    result = sweep(settings, f"{tasks}:two_models", "w -> w")
    student = base_weights(str(model), {}).id
    (trial,) = result.trials
    assert trial.error is None
    assert [candidate.score for candidate in trial.candidates] == [20.0, 50.0, 80.0]
    baseline, once, twice = (candidate.weights for candidate in trial.candidates)
    assert baseline == {"first": other, "second": student}
    for weights in (once, twice):
        assert weights["first"].startswith(f"{other}-ft-")
        assert weights["second"].startswith(f"{student}-ft-")
    assert {request["weights"] for request in request_log()} >= {*baseline.values(), *once.values(), *twice.values()}

    best = bt_ray.load(Path(settings["run_dir"]) / "best")
    assert best(question="number 27").answer == "54"
    assert [predictor.lm.kwargs["max_tokens"] for predictor in best.predictors()] == [50, 1024], "each samples as before"
    best.first.lm.kill()


def test_a_prompt_optimizer_on_several_models_is_refused_and_the_strategy_ends_with_its_best(
    settings: dict[str, Any], tasks: Path
) -> None:
    result = sweep(settings, f"{tasks}:two_models", "p")
    assert "cannot optimize a program whose predictors use different LMs" in (result.trials[0].error or "")
    assert [candidate.prefix for candidate in result.trials[0].candidates] == [""]


@pytest.mark.parametrize(("task", "fine_tunes"), [("one_model_for_each", 2), ("one_model_for_all", 1)])
def test_predictors_of_one_model_are_fine_tuned_together_or_each_on_its_own(
    settings: dict[str, Any], tasks: Path, task: str, fine_tunes: int
) -> None:
    result = sweep(settings, f"{tasks}:{task}", "w -> w")
    (trial,) = result.trials
    assert trial.error is None
    assert [candidate.score for candidate in trial.candidates] == [20.0, 50.0, 80.0]
    assert [len(set(candidate.weights.values())) for candidate in trial.candidates] == [1, fine_tunes, fine_tunes]
    assert len(list(Path(settings["run_dir"], "weights").iterdir())) == 2 * fine_tunes, "a shared model is trained once"


def test_one_slot_serves_a_program_with_two_models_in_turns(settings: dict[str, Any], tasks: Path) -> None:
    server = {**settings["server"], "count": 1}
    result = sweep(settings, f"{tasks}:two_models", "w", server=server, num_threads=20)
    assert [candidate.score for candidate in result.trials[0].candidates] == [20.0, 50.0]


def test_a_model_is_named_inside_a_task_alone(tasks: Path) -> None:
    with pytest.raises(bt_ray.BtRayError, match=r"call it inside build\(\) or optimizers\(ctx\)"):
        bt_ray.served(str(tasks.with_name("other")))


def test_a_model_that_is_not_there_is_told_before_anything_starts(settings: dict[str, Any], tasks: Path) -> None:
    shutil.rmtree(tasks.with_name("other"))
    with pytest.raises(bt_ray.BtRayError, match=r"the folder .*other does not exist"):
        sweep(settings, f"{tasks}:two_models", "w")


@pytest.mark.parametrize(
    ("task", "predictors"),
    [
        ("chain_of_thought", {"predict"}),
        ("nested", {"inner['one'].steps[0].predict", "inner['one'].steps[1]"}),
        ("react", {"react", "extract.predict"}),
    ],
)
def test_modules_of_modules_are_optimized_fine_tuned_and_opened_again(
    settings: dict[str, Any], tasks: Path, task: str, predictors: set[str]
) -> None:
    result = sweep(settings, f"{tasks}:{task}", "w", "p -> w")
    assert [trial.error for trial in result.trials] == [None, None]
    baseline, tuned = result.trials[0].candidates
    assert not tuned.example_errors
    assert (baseline.score, tuned.score) == (20.0, 50.0)
    assert set(tuned.weights) == predictors
    assert len(set(tuned.weights.values())) == 1
    assert tuned.weights != baseline.weights
    best = bt_ray.load(Path(settings["run_dir"]) / "best")
    assert best(question="number 4").answer == "8"
    best.predictors()[0].lm.kill()
    if task == "react":
        used = tasks.with_name("tool.txt").read_text().split()
        assert {"4", "100", "119"} <= set(used), "the tool was called in every process"

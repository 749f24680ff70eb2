"""Whole sweeps on a real Ray with scripted servers and trainers, whose scores are known in advance."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from conftest import MARK, SCRIPTED_SCORES, SUPPORT
from support.processes import MarkedProcesses, wait_for

import bt_ray
from bt_ray.run_dir.run_directory import read_steps
from bt_ray.run_dir.storage import open_storage

pytestmark = pytest.mark.usefixtures("local_ray")


def sweep(settings: dict[str, Any], **changed: Any) -> bt_ray.SweepResult:
    return bt_ray.sweep(changed.pop("task", settings["task"]), {**settings, **changed})


def test_each_step_is_scored_and_the_best_of_all_strategies_is_kept(settings: dict[str, Any], request_log: Any) -> None:
    result = sweep(settings)
    assert {(c.strategy, c.prefix): c.score for c in result.candidates} == SCRIPTED_SCORES
    assert result.best is not None
    assert (result.best.strategy, result.best.score) == ("p -> w", 70.0), "the tie goes to the strategy given first"
    assert [trial.best and trial.best.test_score for trial in result.trials] == [70.0, 70.0]
    assert [c.test_score for c in result.candidates].count(None) == 4, "the best of each strategy, and nothing else"
    asked = [r["question"] for r in request_log() if 50 <= int(r["question"]) < 70]
    assert (len(asked), len(set(asked))) == (40, 20), "each once"
    assert [trial.error for trial in result.trials] == [None, None]
    assert sum(result.best.example_scores) == 14

    # After w, the weights of w answer: also when p optimizes.
    base = result.candidates[-1].weights["self"]
    trained = {c.weights["self"] for c in result.candidates} - {base}
    assert len(trained) == 2
    for candidate in result.candidates:
        assert (candidate.weights["self"] == base) == ("w" not in candidate.prefix)
    asked = {(r["weights"] == base, r["demos"]) for r in request_log()}
    assert asked == {(True, 0), (True, 2), (False, 0), (False, 2)}


def test_the_run_directory_holds_the_result_and_a_best_program_that_answers(settings: dict[str, Any]) -> None:
    result = sweep(settings)
    run_dir = Path(settings["run_dir"])
    written = json.loads((run_dir / "result.json").read_text())
    assert written["best"]["score"] == 70.0
    assert bt_ray.SweepResult.read(run_dir / "result.json") == result
    assert not list(run_dir.glob("best/*.pkl"))
    for candidate in result.candidates:
        state = json.loads((run_dir / candidate.program).read_text())
        assert state["lm"] is None

    program = bt_ray.load(run_dir / "best")
    assert program(question="number 26").answer == "52", "skill 5 and two demos answer 6"
    assert program(question="number 27").answer == "wrong"
    program.lm.kill()


def test_answers_that_are_cut_off_are_counted(settings: dict[str, Any]) -> None:
    sweep(settings, strategies=["p"], lm={"max_tokens": 9})
    _, steps = read_steps(open_storage(settings["run_dir"]))
    assert [(steps[prefix].requests, steps[prefix].cut_off) for prefix in ("", "p")] == [(20, 20), (20, 20)]


def test_a_sweep_leaves_no_actor_to_a_ray_that_goes_on(settings: dict[str, Any]) -> None:
    sweep(settings, strategies=["p"])
    processes = MarkedProcesses(os.environ[MARK])
    actors = ("ray::StepClaims", "ray::ServerPool", "ray::ModelServer", "ray::TestEvaluation", "ray::ImplicitFunc")
    wait_for("the sweep's actors to be gone", lambda: not processes.named(*actors))


def test_a_failed_step_ends_its_strategy_with_the_best_so_far_and_the_others_go_on(settings: dict[str, Any]) -> None:
    result = sweep(settings, strategies=["p -> bad -> w", "w"])
    failed, fine = result.trials
    assert [c.prefix for c in failed.candidates] == ["", "p"]
    assert failed.error == "RuntimeError: this optimizer rejects everything"
    assert "Traceback" in (failed.traceback or "")
    assert fine.error is None
    assert result.best is not None
    assert result.best.prefix == "w"


def test_an_empty_training_set_says_what_left_nothing(settings: dict[str, Any]) -> None:
    result = sweep(settings, task=f"{SUPPORT / 'tasks.py'}:hard_to_please", strategies=["w"])
    (trial,) = result.trials
    assert "the metric's filter left none of the 20 bootstrapped traces" in (trial.error or "")
    assert [c.prefix for c in trial.candidates] == [""]


def test_a_metric_that_raises_is_an_error_and_no_score_of_0(settings: dict[str, Any]) -> None:
    result = sweep(settings, task=f"{SUPPORT / 'tasks.py'}:broken_metric", strategies=["p"])
    (trial,) = result.trials
    assert trial.candidates == ()
    assert "stopped after 10 failed examples (max_errors)" in (trial.error or "")
    assert result.best is None


def test_a_metric_that_asks_a_model_is_not_given_the_student(settings: dict[str, Any]) -> None:
    result = sweep(settings, task=f"{SUPPORT / 'tasks.py'}:judged", strategies=["p"])
    assert [c.score for c in result.trials[0].candidates] == [20.0, 40.0]
    assert result.test_score == 40.0


def test_a_trial_that_is_lost_is_a_row_with_its_error(settings: dict[str, Any]) -> None:
    result = sweep(settings, task=f"{SUPPORT / 'tasks.py'}:deadly", strategies=["p"], trial={"max_failures": 0})
    (trial,) = result.trials
    assert trial.candidates == ()
    assert "died unexpectedly" in (trial.error or "")
    assert "\n" not in (trial.error or "")


def test_a_server_that_cannot_start_fails_the_trial_with_its_last_lines(settings: dict[str, Any]) -> None:
    server = {**settings["server"], "env": {"SCRIPTED_START": "die"}}
    result = sweep(settings, server=server, strategies=["p"], trial={"max_failures": 0})
    (trial,) = result.trials
    assert "ended with status 7" in (trial.error or "")
    assert "the engine found no memory" in (trial.traceback or "")
    assert trial.candidates == ()


def test_a_failing_test_of_the_winner_loses_no_result(settings: dict[str, Any]) -> None:
    with pytest.raises(bt_ray.BtRayError, match="no test today"):
        sweep(settings, task=f"{SUPPORT / 'tasks.py'}:failing_test", strategies=["p"])
    kept = bt_ray.SweepResult.read(Path(settings["run_dir"]) / "result.json")
    assert kept.best is not None
    assert (kept.best.score, kept.test_score) == (40.0, None)


def test_a_program_whose_task_moved_says_how_to_name_it(settings: dict[str, Any]) -> None:
    sweep(settings, strategies=["p"])
    with pytest.raises(bt_ray.BtRayError, match="If the task is elsewhere now"):
        bt_ray.load(Path(settings["run_dir"]) / "best", task="/gone/task.py:build")


def test_one_slot_is_enough_and_each_strategy_gets_it_in_turn(settings: dict[str, Any]) -> None:
    result = sweep(settings, server={**settings["server"], "count": 1}, strategies=["p -> w -> p", "w", "p"])
    assert [trial.best.score for trial in result.trials if trial.best] == [70.0, 50.0, 40.0]


def test_without_validation_the_latest_program_wins(settings: dict[str, Any]) -> None:
    result = sweep(settings, task=f"{SUPPORT / 'tasks.py'}:without_valset", valset_ratio=0, strategies=["w -> p"])
    assert [c.score for c in result.candidates] == [None, None, None]
    assert result.best is not None
    assert result.best.prefix == "w -> p"


def test_more_servers_than_the_cluster_has_room_for_is_told_within_seconds(settings: dict[str, Any]) -> None:
    with pytest.raises(bt_ray.BtRayError, match="asks for 90 servers of 1 CPU each; the cluster has room for 8"):
        sweep(settings, server={**settings["server"], "count": 90})

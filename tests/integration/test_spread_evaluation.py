"""Evaluations that several processes share give what one gives, whatever becomes of the processes."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import MARK, SCRIPTED_SCORES, SUPPORT
from hypothesis import given
from hypothesis import strategies as st
from support.processes import MarkedProcesses, wait_for

import bt_ray
from bt_ray.run_dir.run_directory import read_steps
from bt_ray.run_dir.storage import open_storage
from bt_ray.trial.parallel_evaluation import gather, shares, split_examples

THREE = {"processes": 3}


def sweep(settings: dict[str, Any], **changed: Any) -> bt_ray.SweepResult:
    return bt_ray.sweep(changed.pop("task", settings["task"]), {**settings, **changed})


def scores_of(result: bt_ray.SweepResult) -> list[Any]:
    return [(c.prefix, c.score, c.example_scores, c.test_score, c.test_example_scores) for c in result.candidates]


@given(st.lists(st.integers()), st.integers(1, 9))
def test_parts_are_about_equal_and_come_together_in_order(examples: list[int], parts: int) -> None:
    found = split_examples(examples, parts)
    assert list(gather(found)) == examples
    sizes = [len(part) for part in found]
    assert not sizes or (min(sizes) > 0 and max(sizes) - min(sizes) <= 1)


@given(st.integers(1, 99), st.integers(1, 9))
def test_threads_are_shared_out_and_each_process_has_one(total: int, parts: int) -> None:
    threads = shares(total, parts)
    assert min(threads) >= 1
    assert sum(threads) == max(total, parts)


@pytest.mark.usefixtures("local_ray")
def test_three_processes_give_what_one_gives_and_leave_nothing(settings: dict[str, Any]) -> None:
    result = sweep(settings, trial=THREE)
    assert {(c.strategy, c.prefix): c.score for c in result.candidates} == SCRIPTED_SCORES
    _, steps = read_steps(open_storage(settings["run_dir"]))
    assert {step.requests for step in steps.values()} == {20}, "what the others asked is counted too"
    alone = sweep(settings, run_dir=f"{settings['run_dir']}-alone")
    assert scores_of(result) == scores_of(alone)
    events = [json.loads(line) for line in Path(settings["run_dir"], "events.jsonl").read_text().splitlines()]
    holders = {event["holder"] for event in events if event["kind"] == "lease" and event.get("holder")}
    assert {f"trial {strategy}, process {n}" for strategy in ("p -> w", "w -> p") for n in (2, 3)} <= holders
    assert {f"test of {prefix}, process 2" for prefix in ("p -> w", "w -> p")} <= holders
    processes = MarkedProcesses(os.environ[MARK])
    wait_for("the other processes to be gone", lambda: not processes.named("ray::EvaluatingProcess"))


@pytest.mark.long
@pytest.mark.usefixtures("local_ray")
def test_failed_examples_of_all_processes_stop_an_evaluation_and_their_logs_tell_why(settings: dict[str, Any]) -> None:
    result = sweep(settings, task=f"{SUPPORT / 'tasks.py'}:broken_metric", strategies=["p"], trial=THREE)
    (trial,) = result.trials
    assert trial.candidates == ()
    assert "stopped after 10 failed examples (max_errors)" in (trial.error or "")
    assert "no such field" in Path(settings["run_dir"], "trials/000-p/process-2/log.txt").read_text()


@pytest.mark.long
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("first", [0, 50])
def test_a_process_that_dies_in_a_step_or_in_the_test_costs_no_score(
    first: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    shutil.copy(SUPPORT / "tasks.py", tmp_path / "own_tasks.py")
    task = {"task": f"{tmp_path / 'own_tasks.py'}:deadly_elsewhere", "args": {"first": first}}
    result = sweep(settings, **task, strategies=["p"], trial=THREE)
    assert (tmp_path / "computed.txt").exists(), "it died"
    assert [c.score for c in result.trials[0].candidates] == [20.0, 40.0]
    assert result.test_score == 40.0


@pytest.mark.long
@pytest.mark.usefixtures("local_ray")
def test_what_the_users_code_raises_in_another_process_is_the_users_failure(settings: dict[str, Any]) -> None:
    result = sweep(settings, task=f"{SUPPORT / 'tasks.py'}:broken_elsewhere", strategies=["p"], trial=THREE)
    (trial,) = result.trials
    assert trial.candidates == ()
    assert (trial.error or "").startswith("TypeError")


@pytest.mark.long
@pytest.mark.usefixtures("local_ray")
def test_tests_whose_processes_do_not_all_have_room_at_once_wait_for_each_other(settings: dict[str, Any]) -> None:
    """Of 8 CPUs the two servers leave room for the processes of one test."""
    result = sweep(settings, strategies=["p", "w"], trial={"processes": 2, "cpus": 2.9})
    assert [trial.best and trial.best.test_score for trial in result.trials] == [40.0, 50.0]

"""What MLflow, TensorBoard and Weights & Biases are told of a sweep: the real packages, with stores on this disk."""

import sqlite3
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from tensorboardX.proto.event_pb2 import Event as Recorded
from typer.testing import CliRunner

import bt_ray
from bt_ray.cli import app
from bt_ray.events import Stage, StepFinished
from bt_ray.settings.config import make_config
from bt_ray.tracking.mlflow_runs import traced

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture
def tracked(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)  # where MLflow's client keeps the artifacts of a store that is a database
    return {**settings, "strategies": ["p"], "tracking": {"mlflow": f"sqlite:///{tmp_path}/mlflow.db"}}


def runs(tracked: dict[str, Any]) -> tuple[MlflowClient, dict[str, Run]]:
    """The client, and the runs of the one experiment, by name."""
    client = MlflowClient(tracked["tracking"]["mlflow"])
    experiment = client.get_experiment_by_name("tasks")
    assert experiment is not None
    return client, {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


def steps(client: MlflowClient, run: Run, metric: str) -> dict[int, float]:
    history = client.get_metric_history(run.info.run_id, metric)
    assert len({value.step for value in history}) == len(history), "no step is told twice"
    return {value.step: value.value for value in history}


def scalars(file: Path) -> dict[str, list[float]]:
    """The values of each tag in a file of TensorBoard's."""
    content, at, found = file.read_bytes(), 0, {}  # type: ignore[var-annotated]
    while at < len(content):
        (size,) = struct.unpack_from("<Q", content, at)
        for value in Recorded.FromString(content[at + 12 : at + 12 + size]).summary.value:
            found.setdefault(value.tag, []).append(value.simple_value)
        at += 12 + size + 4
    return found


@pytest.mark.long
def test_a_sweep_is_a_run_of_mlflows_with_one_for_each_strategy_below_it_and_a_board(
    tracked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracked["tracking"] |= {"autolog": True, "tensorboard": "boards", "wandb": "sweeps"}
    bt_ray.sweep(tracked["task"], {**tracked, "strategies": ["w"]})
    client, found = runs(tracked)
    assert set(found) == {"sweep tasks", "w"}
    sweep, trial = found["sweep tasks"], found["w"]
    assert trial.data.tags["mlflow.parentRunId"] == sweep.info.run_id
    assert steps(client, trial, "score") == {0: 20.0, 1: 50.0}
    assert steps(client, trial, "best_score") == {0: 20.0, 1: 50.0}
    assert (sweep.info.status, trial.info.status) == ("FINISHED", "FINISHED")
    assert (sweep.data.metrics["winner_score"], sweep.data.params["train.method"]) == (50.0, "lora")
    artifacts = {file.path for file in client.list_artifacts(sweep.info.run_id)}
    assert artifacts == {"best", "config.json", "report.html", "result.json"}
    assert len(client.list_artifacts(trial.info.run_id, "programs")) == 2

    traces = client.search_traces(locations=[trial.info.experiment_id], max_results=200, include_spans=False)
    assert {trace.info.trace_metadata["mlflow.sourceRun"] for trace in traces} == {trial.info.run_id}
    assert len(traces) >= 40, "two evaluations of 20 examples"

    (file,) = (tmp_path / "boards" / "run" / "000-w").glob("events.out.tfevents.*")
    assert scalars(file)["ray/tune/score"] == [20.0, 50.0]
    (offline,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert list(offline.glob("*.wandb"))

    tracked["tracking"] = {"mlflow": tracked["tracking"]["mlflow"]}
    bt_ray.sweep(tracked["task"], {**tracked, "strategies": ["w", "w -> p"]})
    client, found = runs(tracked)
    assert set(found) == {"sweep tasks", "w", "w -> p"}, "it goes on in its runs"
    assert found["sweep tasks"].info.run_id == sweep.info.run_id
    assert [len(steps(client, found[name], "score")) for name in ("w", "w -> p")] == [2, 3]


def test_a_sweep_goes_on_without_its_tracking_store(tracked: dict[str, Any], tmp_path: Path) -> None:
    told: list[str] = []

    def listener(event: Any) -> None:
        if isinstance(event, Stage):
            told.append(event.text)
        if isinstance(event, StepFinished) and not event.prefix:
            with sqlite3.connect(tmp_path / "mlflow.db") as store:
                store.execute("DROP TABLE metrics")

    result = bt_ray.sweep(tracked["task"], tracked, listener=listener)
    assert [candidate.score for candidate in result.trials[0].candidates] == [20.0, 40.0]
    assert len([text for text in told if text.startswith("MLflow was not told everything")]) == 1


def test_a_failed_strategy_is_a_failed_run(tracked: dict[str, Any]) -> None:
    task = tracked["task"].replace(":double", ":broken_metric")
    bt_ray.sweep(task, tracked)
    _, found = runs(tracked)
    assert (found["sweep tasks"].info.status, found["p"].info.status) == ("FINISHED", "FAILED")
    assert "The evaluation was stopped after 10 failed examples" in found["p"].data.tags["error"]


def test_a_trial_that_cannot_reach_its_tracking_server_runs_untraced(settings: dict[str, Any]) -> None:
    config = make_config({**settings, "tracking": {"mlflow": "http://127.0.0.1:9", "autolog": True}})
    ran = False
    with traced(config, "runs/today", "p", ""):
        ran = True
    assert ran


CHECKED: list[tuple[dict[str, Any], str]] = [
    ({"autolog": True}, "autolog is MLflow's: set tracking.mlflow too"),
    ({"mlflow": "http://me:secret@host"}, "set MLFLOW_TRACKING_USERNAME"),
    ({"mlflow": "http://127.0.0.1:9"}, "http://127.0.0.1:9 cannot be used"),
]


@pytest.mark.parametrize(("tracking", "message"), CHECKED)
def test_what_cannot_work_is_told_before_anything_starts(
    tracked: dict[str, Any], tracking: dict[str, Any], message: str, request_log: Callable[[], list[Any]]
) -> None:
    with pytest.raises(bt_ray.BtRayError, match=message):
        bt_ray.sweep(tracked["task"], {**tracked, "tracking": tracking})
    assert not request_log()


def test_a_package_that_is_missing_is_told_by_check(
    tracked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bt_ray.driver.check.find_spec", lambda package: None)
    (tmp_path / "sweep.toml").write_text(
        f'task = "{tracked["task"]}"\nmodel = "{tracked["model"]}"\nstrategies = ["p"]\n[tracking]\nwandb = "sweeps"\n'
    )
    told = CliRunner().invoke(app, ["check", str(tmp_path / "sweep.toml")])
    assert told.exit_code == 2
    assert 'tracking.wandb: the package is not installed. Run: pip install "bt-ray[wandb]"' in told.output

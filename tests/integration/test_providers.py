"""Programs on an API's models, and what fine-tunes them. The API is a scripted one in a child process."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.api_server import KEY
from support.running_api import Api, running_api

import bt_ray
from bt_ray.events import Stage

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with running_api(tmp_path, "api_tasks.py", "tasks.py") as running:
        yield running


def without_model(settings: dict[str, Any], *strategies: str) -> dict[str, Any]:
    return {**{key: value for key, value in settings.items() if key not in ("model", "server")}, "strategies": strategies}


def assert_no_key_is_kept(settings: dict[str, Any]) -> None:
    kept = [file for file in Path(settings["run_dir"]).rglob("*") if file.is_file()]
    assert kept
    assert not [file for file in kept if KEY.encode() in file.read_bytes()]


def test_a_sweep_on_an_api_needs_no_model_and_no_server(settings: dict[str, Any], api: Api) -> None:
    events = []
    config = without_model(settings, "p", "p -> p")
    result = bt_ray.sweep(f"{api.tasks}:prompts_alone", config, listener=events.append)
    assert [trial.error for trial in result.trials] == [None, None]
    assert [candidate.score for candidate in result.trials[1].candidates] == [40.0, 60.0, 60.0]
    assert result.test_score == 60.0
    assert not [event for event in events if "server" in str(event).lower()]
    assert not Path(settings["run_dir"], "events.jsonl").exists()
    assert {request["model"] for request in api.log()} == {"skill-4"}
    assert_no_key_is_kept(settings)

    best = bt_ray.load(Path(settings["run_dir"]) / "best")
    assert (best(question="number 25").answer, best(question="number 26").answer) == ("50", "wrong")


def test_an_api_that_is_gone_is_no_score_of_0_on_the_testset(settings: dict[str, Any], api: Api) -> None:
    def listener(event: Any) -> None:
        if isinstance(event, Stage) and "on the testset" in event.text:
            api.process.kill()
            api.process.wait()

    with pytest.raises(bt_ray.BtRayError, match="Connection refused"):
        bt_ray.sweep(f"{api.tasks}:prompts_alone", without_model(settings, "p"), listener=listener)
    kept = bt_ray.SweepResult.read(Path(settings["run_dir"]) / "result.json")
    assert [(candidate.score, candidate.test_score) for candidate in kept.candidates] == [(60.0, None), (40.0, None)]


def test_a_model_is_asked_for_where_a_predictor_has_no_lm(settings: dict[str, Any]) -> None:
    with pytest.raises(bt_ray.BtRayError, match="Predictor 'self' has no LM, and the sweep names no model"):
        bt_ray.sweep(settings["task"], without_model(settings, "p"))


def test_an_api_teaches_the_sweeps_model(settings: dict[str, Any], api: Api) -> None:
    result = bt_ray.sweep(f"{api.tasks}:taught", {**settings, "strategies": ["w"]})
    assert [candidate.score for candidate in result.trials[0].candidates] == [20.0, 50.0]
    assert {request["question"] for request in api.log()} == {str(number) for number in range(100, 120)}
    (data,) = Path(settings["run_dir"]).glob("trainings/*/*/data.jsonl")
    assert len(data.read_text().splitlines()) == 8, "what the API gets right"


def test_some_predictors_may_be_on_an_api(settings: dict[str, Any], api: Api, request_log: Any) -> None:
    result = bt_ray.sweep(f"{api.tasks}:mixed", {**settings, "strategies": ["w"]})
    (trial,) = result.trials
    assert trial.error is None
    assert [candidate.score for candidate in trial.candidates] == [20.0, 50.0]
    assert [candidate.api_models for candidate in trial.candidates] == [{"first": "openai/skill-4"}] * 2
    assert {request["model"] for request in api.log()} == {"skill-4"}
    assert {request["weights"] for request in request_log()} == {c.weights["second"] for c in trial.candidates}


def test_openais_fine_tuning_is_a_step_like_any_other(settings: dict[str, Any], api: Api) -> None:
    config = without_model(settings, "w", "w -> p")
    result = bt_ray.sweep(f"{api.tasks}:fine_tuned_by_openai", config)
    assert [trial.error for trial in result.trials] == [None, None]
    assert [candidate.score for candidate in result.trials[1].candidates] == [40.0, 70.0, 90.0]
    (fine_tune,) = [request for request in api.log() if "examples" in request]
    assert fine_tune == {"model": "skill-4", "examples": 8, "hyperparameters": {"n_epochs": 2}}
    assert result.trials[1].candidates[-1].api_models == {"self": "ft:gpt-4o-mini-2024-07-18:skill-7::job-0"}
    assert_no_key_is_kept(settings)

    asked = len(api.log())
    again = bt_ray.sweep(f"{api.tasks}:fine_tuned_by_openai", config)
    assert (again.candidates, len(api.log())) == (result.candidates, asked), "nothing is computed again"
    best = bt_ray.load(Path(settings["run_dir"]) / "best")
    assert best(question="number 28").answer == "56"


def test_databricks_fine_tuning_is_a_step_like_any_other(settings: dict[str, Any], tmp_path: Path) -> None:
    tasks = ("databricks_tasks.py", "tasks.py")
    with running_api(tmp_path, *tasks, server="databricks_server.py") as workspace:
        config = without_model(settings, "w", "w -> p")
        result = bt_ray.sweep(f"{workspace.tasks}:fine_tuned_by_databricks", config)
        assert [trial.error for trial in result.trials] == [None, None]
        assert [candidate.score for candidate in result.trials[1].candidates] == [40.0, 70.0, 90.0]
        uploaded, ordered, deployed = workspace.log()
        assert (uploaded["lines"], Path(uploaded["file"]).parent) == (8, Path("/Volumes/main/default/data/sweep"))
        assert ordered == {
            "model": "meta/skill-4",
            "train_data_path": uploaded["file"],
            "register_to": "main.default.skill-7",
            "training_duration": "2ep",
        }
        assert deployed == {"endpoint": "main_default_skill-7", "entity_version": 1}
        assert result.trials[1].candidates[-1].api_models == {"self": "databricks/main_default_skill-7"}
        assert_no_key_is_kept(settings)

        best = bt_ray.load(Path(settings["run_dir"]) / "best")
        assert best(question="number 28").answer == "56"


def test_a_provider_of_the_users_own_is_asked_as_dspy_asks_it(settings: dict[str, Any], api: Api) -> None:
    config = without_model(settings, "w -> p")
    result = bt_ray.sweep(f"{api.tasks}:fine_tuned_by_the_users_own", config)
    assert result.trials[0].error is None
    assert [candidate.score for candidate in result.trials[0].candidates] == [40.0, 90.0, 100.0]
    noted = api.tasks.with_name("provider.txt").read_text().splitlines()
    assert [line for line in noted if line.startswith("finetune")] == ["finetune openai/skill-4 on 8"]
    assert {"launch openai/skill-4", "kill openai/skill-4", "launch openai/skill-9"} <= set(noted)


def test_an_api_that_refuses_is_no_score_of_0(settings: dict[str, Any], api: Api) -> None:
    text = api.tasks.read_text().replace("api_key=KEY", 'api_key="wrong"').replace("skill-4", "skill-5")
    api.tasks.write_text(text)  # another model, whose answers DSPy's cache has not seen
    result = bt_ray.sweep(f"{api.tasks}:prompts_alone", without_model(settings, "p"))
    (trial,) = result.trials
    assert trial.candidates == ()
    assert trial.error is not None

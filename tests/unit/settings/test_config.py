"""Settings: what a person writes, and the errors for what is wrong."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from bt_ray.errors import ConfigError
from bt_ray.settings.config import SweepConfig, make_config, override_train
from bt_ray.settings.toml import load_config

MINIMAL = {"task": "m:build", "model": "org/name", "strategies": ["p"]}


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "sweep.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"strategis": ["p"]}, "unknown key 'strategis'. Did you mean 'strategies'?"),
        ({"lm": {"temprature": 1}}, "unknown key 'lm.temprature'. Did you mean 'temperature'?"),
        ({"server": {"max_model_length": 1}}, "server: unknown key 'max_model_length'. Did you mean 'max_model_len'?"),
        ({"server": {"cpu": 1}}, "server: unknown key 'cpu'. Did you mean 'cpus'?"),
        ({"server": {"port": 80}}, "port is set by bt_ray itself"),
        ({"server": {"api_key": "x"}}, "api_key is set by bt_ray itself"),
        ({"server": {"enable_lora": True}}, "enable_lora is set by bt_ray itself: it follows `server.fine_tunes`"),
        ({"server": {"gpus": 1.5}}, "above 1, a slot takes whole GPUs"),
        ({"train": {"method": "qlora"}}, "train.method: Input should be 'lora' or 'full' (it is 'qlora')."),
        ({"valset_ratio": 1}, "valset_ratio: Input should be less than 1 (it is 1)."),
        ({"strategies": []}, "strategies: no strategy is given"),
        ({"run_dir": "ftp://host/run"}, "run_dir: ftp:// is not supported: give a path, or a URI"),
        ({"train": {"scheduler": "linaer"}}, "train.scheduler: Input should be 'linear', 'cosine'"),
        (
            {"server": {"models": {"org/large": {"gpu": 4}}}},
            "server: models.\"org/large\": unknown key 'gpu'. Did you mean 'gpus'?",
        ),
        ({"args": {"x": [1.0, float("inf")]}}, "args.x.1 = inf: settings are kept as JSON"),
        ({"server": {"models": {"org/large": {"count": 0}}}}, 'models."org/large": count: Input should be greater'),
        ({"server": {"models": {"org/large": {"fine_tunes": "merged"}}}}, "fine_tunes is the same for all models"),
        ({"server": {"models": {"/a/large": {}, "/b/large": {}}}}, "two are called large"),
        ({"num_threads": 0}, "num_threads: Input should be greater than or equal to 1"),
    ],
)
def test_a_wrong_setting_is_named_with_the_nearest_right_one(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config({**MINIMAL, **values})
    assert message in str(caught.value)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ConfigError, match="'strategies' is missing"):
        make_config({"task": "m:build", "model": "m"})


def test_a_model_with_slots_of_its_own_has_what_differs_there() -> None:
    own = {"count": 1, "gpus": 4, "accelerator_type": "H100", "max_model_len": 8192, "env": {"SECRET": "x"}}
    server = {"count": 8, "gpus": 1, "max_model_len": 4096, "dtype": "bfloat16", "models": {"org/large": own}}
    server |= {"env": {"HF_HOME": "/hf"}, "accelerator_type": "L4"}
    config = make_config({**MINIMAL, "server": server})
    large = config.server.of("org--large")
    assert (large.count, large.gpus, large.accelerator_type) == (1, 4, "H100")
    assert large.engine_options == {"max_model_len": 8192, "dtype": "bfloat16"}
    assert config.server.of("m") == config.server
    assert large.env == {"HF_HOME": "/hf", "SECRET": "x"}
    assert "SECRET" not in str(config.without_secrets())


def test_settings_are_frozen_and_survive_json() -> None:
    config = make_config({**MINIMAL, "server": {"count": 2, "max_model_len": 2048, "command": ["a", "b"]}})
    assert config.server.engine_options == {"max_model_len": 2048}
    assert make_config(config.model_dump(mode="json")) == config
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1  # type: ignore[misc]


def test_assignments_reach_any_setting(tmp_path: Path) -> None:
    path = write(
        tmp_path, 'task = "m:build"\nmodel = "org/name"\nstrategies = ["p"]\n[server]\nmax_model_len = 1\ncount = 2'
    )
    config = load_config(path, {}, ["server.max_model_len=2048", "train.learning_rate=1e-3", "model=org/other"])
    assert config.server.engine_options == {"max_model_len": 2048}
    assert config.server.count == 2, "the rest of the section stays"
    assert config.train.learning_rate == 1e-3
    assert config.model == "org/other"
    own = load_config(path, {}, ['server.models."org/Large-3.3".count=3', "server.models.'org/Large-3.3'.gpus=1"])
    assert own.server.models == {"org/Large-3.3": {"count": 3, "gpus": 1}}
    with pytest.raises(ConfigError, match="write it as key=value"):
        load_config(path, {}, ["seed"])


def test_paths_in_the_file_are_relative_to_the_file_and_others_to_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    text = 'task = "task.py:build"\nmodel = "../models/m"\nstrategies = ["p"]\nrun_dir = "runs/x"'
    path = write(tmp_path, text)
    config = load_config(path)
    assert config.task == f"{tmp_path}/task.py:build"
    assert config.model == str(tmp_path.parent / "models/m")
    assert config.run_dir == f"{tmp_path}/runs/x"
    assert load_config(path, {"run_dir": "runs/y"}).run_dir == f"{tmp_path}/here/runs/y"


def test_a_relative_path_is_refused_inside_a_job_unless_it_is_replaced(tmp_path: Path) -> None:
    path = write(tmp_path, 'task = "task.py:build"\nmodel = "./m"\nstrategies = ["p"]')
    with pytest.raises(ConfigError, match=r"model: \./m is relative\. A job's working directory is a copy"):
        load_config(path, refuse_relative=True)
    with pytest.raises(ConfigError, match="run_dir: runs/x is relative"):
        load_config(path, {"run_dir": "runs/x"}, ["model=/m"], refuse_relative=True)
    assert load_config(path, {"run_dir": "/r"}, ["model=/m"], refuse_relative=True).model == "/m"
    path.write_text('task = "task.py:build"\nmodel = "/m"\nstrategies = ["p"]\n[server.models."./other"]\ncount = 1')
    with pytest.raises(ConfigError, match=r"server\.models: \./other is relative"):
        load_config(path, {"run_dir": "/r"}, refuse_relative=True)


def test_train_kwargs_of_an_optimizer_override_the_section() -> None:
    train = SweepConfig.model_validate(MINIMAL).train
    assert override_train(train, {"epochs": 9}).epochs == 9
    with pytest.raises(ConfigError, match=r"train_kwargs: unknown key 'epoch'\. Did you mean 'epochs'"):
        override_train(train, {"epoch": 9})


def test_there_are_two_trials_for_each_server_because_one_may_wait_for_a_step_of_the_others() -> None:
    def made(trials: int, servers: int, **trial: int) -> int:
        return make_config({**MINIMAL, "trial": trial}).concurrent_trials(trials, servers)

    assert made(14, 2) == 4
    assert made(3, 8) == 3
    assert made(3, 2, max_concurrent=1) == 1
    assert made(14, 0) == 14


@pytest.mark.parametrize("path", sorted([*ROOT.glob("scripts/**/*.toml"), *ROOT.glob("cluster/**/*.toml")]), ids=str)
def test_every_toml_that_ships_is_valid(path: Path) -> None:
    tomllib.loads(path.read_text())
    load_config(path)


@pytest.mark.parametrize(
    ("strategies", "kept"),
    [
        (["p", "w"], ["p", "w"]),
        ("all(max_length = 3)", {"all": {"max_length": 3, "optimizers": None}}),
        ({"all": {"max_length": 2, "optimizers": ["p"]}}, {"all": {"max_length": 2, "optimizers": ["p"]}}),
        (
            {"search": {"optimizers": ["p", "w"], "max_length": 5, "budget": "8 gpu-hours"}},
            {"search": {"optimizers": ["p", "w"], "max_length": 5, "budget": "8 gpu-hours"}},
        ),
    ],
)
def test_strategies_are_a_list_or_all_or_a_search(strategies: Any, kept: Any) -> None:
    config = make_config({**MINIMAL, "strategies": strategies})
    assert config.without_secrets()["strategies"] == kept
    assert make_config(config.without_secrets()) == config
    assert make_config(config.model_dump()) == config


@pytest.mark.parametrize(
    ("strategies", "message"),
    [
        ([], "no strategy is given"),
        ("p -> w", "write a list"),
        ("all(max_length = 0)", "greater than or equal to 1"),
        ({"search": {"max_length": 5}}, "budget"),
        ({"search": {"max_length": 5, "budget": "8 cows"}}, "write a number of steps, tokens, hours, gpu-hours"),
        ({"search": {"max_length": 5, "budget": "0 steps"}}, "write a number of"),
    ],
)
def test_strategies_that_are_none_are_told(strategies: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config({**MINIMAL, "strategies": strategies})
    assert message in str(caught.value)

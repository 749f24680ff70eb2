"""The space of a sweep: lists and distributions of settings."""

from pathlib import Path
from typing import Any

import pytest
from ray import tune

from bt_ray.errors import ConfigError
from bt_ray.settings.config import make_config
from bt_ray.settings.space import variants
from bt_ray.settings.toml import load_config

MINIMAL: dict[str, Any] = {"task": "m:build", "model": "m", "strategies": ["p"]}


def named(**settings: Any) -> list[str]:
    return [variant.name for variant in variants(make_config({**MINIMAL, **settings}))]


def test_without_a_space_there_is_one_variant() -> None:
    (variant,) = variants(make_config(MINIMAL))
    assert (variant.name, variant.config) == ("", make_config(MINIMAL))


def test_lists_are_combined() -> None:
    space = {"seed": [0, 1], "train.learning_rate": [0.1, 0.2], "args.demos": ["few"]}
    found = variants(make_config({**MINIMAL, "space": space, "args": {"other": 1}}))
    assert [(v.config.seed, v.config.train.learning_rate) for v in found] == [(0, 0.1), (1, 0.1), (0, 0.2), (1, 0.2)]
    assert found[0].name == "seed=0, train.learning_rate=0.1, args.demos=few"
    assert found[0].config.args == {"other": 1, "demos": "few"}
    assert found[0].config.space == {}


def test_distributions_are_drawn_the_same_in_each_run() -> None:
    space = {"train.learning_rate": {"loguniform": [1e-5, 1e-3]}, "lm.temperature": {"choice": [0.0, 0.5]}, "seed": [3]}
    drawn = named(space=space, num_samples=5)
    assert drawn == named(space=space, num_samples=5)
    assert drawn != named(space=space, num_samples=5, seed=1)
    assert len(set(drawn)) == 5
    for variant in variants(make_config({**MINIMAL, "space": space, "num_samples": 5})):
        assert 1e-5 <= variant.config.train.learning_rate <= 1e-3
        assert variant.config.lm.temperature in (0.0, 0.5)


def test_ray_tunes_own_distributions_are_taken_from_python() -> None:
    config = make_config({**MINIMAL, "space": {"seed": tune.randint(0, 1000)}, "num_samples": 3})
    assert len(variants(config)) == 3
    assert "Integer" in config.without_secrets()["space"]["seed"], "it can be kept as JSON"


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"server.gpus": [1, 2]}, "'server.gpus' cannot vary: all variants share the servers"),
        ({"strategies": [["p"], ["w"]]}, "'strategies' cannot vary"),
        ({"sead": [1]}, "unknown key 'sead'. Did you mean 'seed'?"),
        ({"train.learning_rate": [0.1, -1]}, "train.learning_rate"),
        ({"seed": []}, "'seed' is an empty list"),
        ({"seed": 3}, "write a list of values, or a distribution"),
        ({"seed": {"randimt": [0, 5]}}, "unknown distribution 'randimt'. Did you mean 'randint'?"),
        ({"seed": {"randint": [0]}}, "'seed': randint = [0]"),
        ({"seed.x": [1]}, "'seed' is no section"),
    ],
)
def test_what_cannot_vary_is_told(space: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        named(space=space)
    assert message in str(caught.value)


def test_samples_of_lists_alone_are_refused() -> None:
    with pytest.raises(ConfigError, match="no distribution to draw from"):
        named(space={"seed": [0]}, num_samples=2)


def test_relative_models_of_a_space_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "sweep.toml").write_text(
        'task = "m:build"\nmodel = "org/m"\nstrategies = "all(max_length = 2)"\n[space]\nmodel = ["./a", "org/b"]\n'
    )
    config = load_config(tmp_path / "sweep.toml")
    assert [variant.config.model for variant in variants(config)] == [str(tmp_path / "a"), "org/b"]

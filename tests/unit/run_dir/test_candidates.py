"""Candidates are found by their names, whatever version kept them."""

from dataclasses import asdict
from pathlib import Path

import pytest
from support.made_sweep import made_sweep

import bt_ray
from bt_ray.errors import ConfigError
from bt_ray.run_dir.candidates import find_candidate
from bt_ray.run_dir.results import SweepResult
from bt_ray.run_dir.run_directory import VariantSteps
from bt_ray.run_dir.storage import Storage
from bt_ray.weights import Weights

BASE = Weights("m", "/models/m")
SETTINGS = {"task": "my/task.py:build", "model": "/models/m", "strategies": ["p"], "space": {"seed": [0, 1]}}


def noted(storage: Storage, **variants: VariantSteps) -> Storage:
    """The made sweep, as today's version notes it."""
    written = {**storage.read_json("sweep.json"), "bases": {"m": BASE.to_json()}}
    named = {name.replace("_", "="): asdict(variant) for name, variant in variants.items()}
    storage.write_json("sweep.json", {**written, "variants": named})
    storage.write_json("config.json", SETTINGS)
    return storage


def test_a_candidate_has_the_settings_of_its_variant(tmp_path: Path) -> None:
    storage = made_sweep(tmp_path, 1)
    steps = {"": "k0", "p": "k1"}
    noted(storage, seed_0=VariantSteps({"seed": 0}, steps), seed_7=VariantSteps({"seed": 7}, steps))
    found = find_candidate(storage, "p [seed=7]")
    assert (found.name, found.variant, found.step.key, found.config.seed) == ("p [seed=7]", "seed=7", "k1", 7)
    assert found.weights == {"m": BASE}
    assert find_candidate(storage, "baseline [seed=0]").config.seed == 0
    with pytest.raises(ConfigError, match=r'no candidate "p"\. .*Its candidates: "baseline \[seed=0\]", "p \[seed=0\]", '):
        find_candidate(storage, "p")


def test_without_a_space_a_candidate_is_called_by_its_prefix(tmp_path: Path) -> None:
    storage = noted(made_sweep(tmp_path, 2), **{"": VariantSteps({}, {"": "k0", "p": "k1", "w": "k2", "w -> x": "k9"})})
    assert find_candidate(storage, "baseline").step.prefix == find_candidate(storage, "").step.prefix == ""
    with pytest.raises(ConfigError, match=r'no candidate "w -> x".* Its candidates: "baseline", "p", "w"\.'):
        find_candidate(storage, "w -> x")  # it failed
    storage.delete("weights/m-ft-k2")
    with pytest.raises(ConfigError, match=r'weights of candidate "w" were removed, by `bt-ray prune` .* are gone'):
        find_candidate(storage, "w")


def test_run_directories_of_earlier_versions_are_read_as_far_as_they_tell(tmp_path: Path) -> None:
    storage = made_sweep(tmp_path, 1)
    storage.write_json("config.json", SETTINGS)
    with pytest.raises(ConfigError, match=r'no candidate "q".*"baseline", "p", "w", "x"'):
        find_candidate(storage, "q")
    with pytest.raises(ConfigError, match=r"does not say where its model m is\. Run the sweep's command again"):
        find_candidate(storage, "p")


def test_a_result_says_where_its_candidates_are_also_when_it_moved(tmp_path: Path) -> None:
    made_sweep(tmp_path / "before", 1)
    (tmp_path / "before").rename(tmp_path / "after")
    result = SweepResult.read(tmp_path / "after" / "result.json")
    assert {candidate.run_dir for candidate in result.candidates} == {str(tmp_path / "after")}
    assert "run_dir" not in result.to_json()["candidates"][0]
    with pytest.raises(bt_ray.BtRayError, match="take it from a result"):
        bt_ray.Candidate("p", "p", 1.0, (), 0.0, 1.0, {}, "steps/k1/a/program.json").load()

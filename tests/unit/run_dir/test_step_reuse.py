"""Steps of other run directories: which are taken, what becomes of their weights, and what is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.object_store import ObjectStore

from bt_ray.errors import ConfigError, StorageError
from bt_ray.run_dir.prune import find_prunable, prune
from bt_ray.run_dir.reuse import check_sources, describe_sources, find_sources, take_steps
from bt_ray.run_dir.run_directory import VariantSteps, prepare_run_directory
from bt_ray.run_dir.step_store import FinishedStep, StepStore, attempt_name
from bt_ray.run_dir.storage import Storage, open_storage
from bt_ray.settings.config import SweepConfig, make_config
from bt_ray.settings.toml import load_config
from bt_ray.slot.node_weights import NodeWeights
from bt_ray.step import KIND, StepKey
from bt_ray.weights import MANIFEST, Weights

BASES = {"m-1": Weights("m-1", "/models/m")}
TUNED = "m-1-ft-aaaaaaaaaaaa"
PREFIXES = {"": "k0", "p": "k1", "p -> w": "k2", "p -> w -> p": "k3"}
KEYS = {
    prefix: StepKey(prefix, key, PREFIXES.get(prefix.rpartition(" -> ")[0], "") if prefix else "", {}, False, {}, KIND)
    for prefix, key in PREFIXES.items()
}


def config(*reuse: str, **settings: Any) -> SweepConfig:
    return make_config({"task": "m:f", "model": "/models/m", "strategies": ["p -> w"], "reuse": list(reuse), **settings})


def run_before(storage: Storage, *prefixes: str) -> StepStore:
    """A run directory with these steps; those after `w` use fine-tuned weights."""
    prepare_run_directory(storage, config(), {prefix: KEYS[prefix] for prefix in prefixes}, {}, BASES)
    store = StepStore(storage)
    for prefix in prefixes:
        commit(store, prefix)
    return store


def commit(store: StepStore, prefix: str, fence: int = 1_000_000) -> None:
    weights = TUNED if "w" in prefix else "m-1"
    attempt, key = attempt_name(fence), KEYS[prefix]
    if weights == TUNED:
        manifest = {"id": TUNED, "parent": "m-1", "files": {}}
        store.storage.write(f"weights/{TUNED}/model.safetensors", b"tuned")
        store.storage.write_json(f"weights/{TUNED}/{MANIFEST}", manifest)
    program = store.write_program(key.key, attempt, json.dumps({"prefix": prefix}).encode())
    step = FinishedStep(key.key, key.parent, prefix, 50.0, (1.0, 0.0), 7.0, 9.0, {"self": weights}, program, 2, {})
    store.commit(step, attempt)
    store.storage.write_json(f"tests/{key.key}-t.json", [50.0, [1.0, 0.0]])


@pytest.fixture(params=["disk", "s3"])
def other(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "s3":
        request.getfixturevalue("s3")
        return open_storage(f"s3://bucket/{tmp_path.name}/other")
    return open_storage(str(tmp_path / "other"))


def take(settings: SweepConfig, store: StepStore, *prefixes: str) -> list[str]:
    missing = [KEYS[prefix].key for prefix in prefixes]
    return take_steps(find_sources(settings, missing, BASES), store, settings, BASES, fence=2_000_000)


@pytest.mark.parametrize("how", ["copy", "reference"])
def test_steps_are_taken_with_their_scores_and_weights(storage: Storage, other: Storage, how: str, tmp_path: Path) -> None:
    theirs = run_before(other, "", "p -> w")
    before = {name: other.read(name) for name in other.files("")}
    settings = config(other.location, reuse_weights=how)
    run_before(storage)
    ours = StepStore(storage)
    (line,) = take(settings, ours, *PREFIXES)
    assert line == f"2 steps are taken from {other.location}, with 1 fine-tune" + (
        " (0.00 GB)" if how == "copy" else ", which stay there"
    )
    found = ours.find_finished(PREFIXES, BASES)
    assert found.keys() == {"", "p -> w"}
    for prefix, step in found.items():
        known = theirs.read(KEYS[prefix].key)
        assert known is not None
        assert replace(step, program=known.program, origin="") == known
        assert step.origin == other.location
        assert ours.read_program(step.program) == theirs.read_program(known.program)
        assert storage.read_json(f"tests/{step.key}-t.json") == [50.0, [1.0, 0.0]]
    weights = ours.read_weights(TUNED)
    assert weights.origin == (None if how == "copy" else other.location)
    node = NodeWeights(storage, tmp_path / "scratch", cache=tmp_path / "cache")
    with node.loadable(weights) as loadable:
        assert Path(loadable.path, "model.safetensors").read_bytes() == b"tuned"
    assert {name: other.read(name) for name in other.files("")} == before, "it is only read"


@pytest.mark.parametrize("how", ["copy", "reference"])
def test_what_the_other_directory_loses_later_is_told_where_it_was_referred_to(tmp_path: Path, how: str) -> None:
    other, storage = open_storage(str(tmp_path / "other")), open_storage(str(tmp_path / "run"))
    run_before(other, "", "p -> w")
    run_before(storage)
    ours = StepStore(storage)
    take(config(other.location, reuse_weights=how), ours, *PREFIXES)
    weights = ours.read_weights(TUNED)
    other.write_json("best/manifest.json", {"predictors": {"self": "m-1"}})
    prune(other, find_prunable(other, only_best=True))
    node = NodeWeights(storage, tmp_path / "scratch", cache=tmp_path / "cache")
    if how == "copy":
        assert ours.find_finished(PREFIXES, BASES).keys() == {"", "p -> w"}
        return
    gone = rf"weights/{TUNED} in {other.location} are gone, to which {storage.location} refers"
    for read in (lambda: ours.read_weights(TUNED), lambda: node.loadable(weights).__enter__()):
        with pytest.raises(StorageError, match=gone):
            read()
    assert ours.find_finished(PREFIXES, BASES).keys() == {""}, "it would be computed again"


def test_what_was_referred_to_is_referred_to_or_copied_from_where_it_lies(tmp_path: Path) -> None:
    first, second = (open_storage(str(tmp_path / name)) for name in ("first", "second"))
    run_before(first, "p -> w")
    run_before(second)
    take(config(first.location, reuse_weights="reference"), StepStore(second), *PREFIXES)
    for how, lies_in in (("copy", None), ("reference", first.location)):
        third = open_storage(str(tmp_path / how))
        run_before(third)
        take(config(second.location, reuse_weights=how), StepStore(third), *PREFIXES)
        assert StepStore(third).read_weights(TUNED).origin == lies_in
        assert Path(tmp_path / how / "weights" / TUNED / "model.safetensors").exists() == (how == "copy")


def test_the_first_directory_that_has_a_step_gives_it_and_none_that_is_here_is_taken(tmp_path: Path) -> None:
    first, second = (open_storage(str(tmp_path / name)) for name in ("first", "second"))
    run_before(first, "", "p")
    run_before(second, "", "p", "p -> w")
    run_before(open_storage(str(tmp_path / "run")), "")
    settings = config(first.location, second.location)
    keys = [key.key for key in KEYS.values()]
    assert describe_sources(settings, str(tmp_path / "run"), keys, BASES) == [
        f"1 step is taken from {first.location}",
        f"1 step is taken from {second.location}",
    ]
    assert describe_sources(config(), str(tmp_path / "run"), keys, BASES) == []


def test_a_step_that_lost_its_weights_here_is_taken_again(tmp_path: Path) -> None:
    other, storage = open_storage(str(tmp_path / "other")), open_storage(str(tmp_path / "run"))
    run_before(other, "p -> w")
    ours = run_before(storage, "p -> w")
    storage.delete(f"weights/{TUNED}")
    take(config(other.location), ours, "p -> w")
    assert ours.find_finished(PREFIXES, BASES)["p -> w"].origin == other.location


def test_keys_of_another_kind_are_never_taken(tmp_path: Path) -> None:
    other, storage = open_storage(str(tmp_path / "old")), open_storage(str(tmp_path / "run"))
    run_before(other, "", "p")
    written = other.read_json("sweep.json")
    other.write_json("sweep.json", {name: value for name, value in written.items() if name != "key_kind"})
    (line,) = take(config(other.location), StepStore(storage), "", "p")
    assert line == f"No step is taken from {other.location}: its keys are of another kind (1, not {KIND})"
    assert StepStore(storage).find_finished(PREFIXES, BASES) == {}


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda folder: None, "is no run directory of a sweep"),
        (lambda folder: folder.mkdir(), "is no run directory of a sweep"),
        (lambda folder: (folder / "sweep.json").mkdir(parents=True), "cannot be read: Is a directory"),
    ],
    ids=["missing", "empty", "unreadable"],
)
def test_a_directory_that_is_of_no_sweep_is_refused(tmp_path: Path, made: Callable[[Path], Any], said: str) -> None:
    made(tmp_path / "other")
    with pytest.raises(ConfigError, match="reuse: .*other.* " + said):
        check_sources(config(str(tmp_path / "other")), str(tmp_path / "run"))


def test_a_bucket_that_is_not_reached_and_the_own_directory_are_refused(s3: ObjectStore, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="reuse: s3://bucket/nowhere is no run directory of a sweep"):
        check_sources(config("s3://bucket/nowhere"), None)
    with pytest.raises(ConfigError, match="is this sweep's own run directory"):
        check_sources(config(str(tmp_path)), str(tmp_path))
    with pytest.raises(ConfigError, match="reuse: ftp:// is not supported"):
        config("ftp://somewhere/else")


def test_paths_are_relative_to_where_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ['task = "m:build"', 'strategies = ["p"]', 'reuse = ["runs/yesterday", "s3://team/runs/tuesday", "/shared"]']
    (tmp_path / "sweep.toml").write_text("\n".join(lines))
    config = load_config(tmp_path / "sweep.toml")
    assert config.reuse == (str(tmp_path / "runs" / "yesterday"), "s3://team/runs/tuesday", "/shared")
    assert config.reuse_weights == "copy"
    monkeypatch.chdir("/")
    given = load_config(tmp_path / "sweep.toml", {}, ["reuse=runs/today", "reuse_weights=reference"])
    assert (given.reuse, given.reuse_weights) == (("/runs/today",), "reference")
    with pytest.raises(ConfigError, match=r"reuse: runs/yesterday is relative\. A job's working directory"):
        load_config(tmp_path / "sweep.toml", {}, refuse_relative=True)


def test_variants_are_named_for_whoever_opens_their_candidates(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    prepare_run_directory(storage, config(), KEYS, {"seed=0": VariantSteps({"seed": 0}, {"": "k0"})}, BASES)
    prepare_run_directory(storage, config(), KEYS, {"seed=1": VariantSteps({"seed": 1}, {"": "k0"})}, BASES)
    written = storage.read_json("sweep.json")
    assert written["variants"].keys() == {"seed=0", "seed=1"}, "those of earlier sweeps stay"
    assert Weights.from_json(written["bases"]["m-1"]) == BASES["m-1"]

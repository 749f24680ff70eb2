"""What a sweep is told that goes on in a run directory: what changed, by name, and that keys of another kind say nothing."""

from dataclasses import replace
from pathlib import Path

import pytest

from bt_ray.errors import ConfigError
from bt_ray.run_dir.run_directory import check_run_directory, prepare_run_directory, read_steps
from bt_ray.run_dir.step_store import FinishedStep, StepStore
from bt_ray.run_dir.storage import Directory
from bt_ray.settings.config import make_config
from bt_ray.step import KIND, StepKey

CONFIG = make_config({"task": "m:f", "strategies": ["p"]})
BASELINE = StepKey("", "k0", "", {"metric": "m0", "program": "g0"}, False, {"function f in task.py": "1"}, KIND)
STEP = StepKey("p", "k1", "k0", {"optimizer p": "o0"}, False, {"value N in task.py": "1", "setting k": "1"}, KIND)


def kept(folder: Path, *keys: StepKey) -> Directory:
    """A run directory in which the steps of these keys are finished."""
    storage = Directory(folder)
    prepare_run_directory(storage, CONFIG, {key.prefix: key for key in keys})
    store = StepStore(storage)
    for key in keys:
        program = store.write_program(key.key, "1-a", b"{}")
        step = FinishedStep(key.key, key.parent, key.prefix, 1.0, (1.0,), 0.0, 1.0, {}, program, 1, {})
        store.commit(step, "1-a")
    return storage


def refusal(folder: Path, *keys: StepKey) -> str:
    with pytest.raises(ConfigError) as caught:
        check_run_directory(str(folder), {key.prefix: key for key in keys}, accept_changes=False)
    return str(caught.value)


def test_what_did_not_change_is_gone_on_with(tmp_path: Path) -> None:
    kept(tmp_path, BASELINE, STEP)
    check_run_directory(str(tmp_path), {"": BASELINE, "p": STEP}, accept_changes=False)


def test_what_changed_is_named(tmp_path: Path) -> None:
    kept(tmp_path, BASELINE, STEP)
    other = replace(STEP, key="k2", parts={"optimizer p": "o1"}, reached={"value N in task.py": "2", "setting k": "2"})
    said = refusal(tmp_path, BASELINE, other)
    assert "something changed since: optimizer p (setting k, value N in task.py). That affects the finished" in said
    assert 'steps "p" but not the baseline' in said
    metric = replace(BASELINE, key="k3", parts={"metric": "m1", "program": "g0"}, reached={"function f in task.py": "2"})
    assert "something changed since: metric (function f in task.py)." in refusal(tmp_path, metric, STEP)


def test_many_changes_are_counted(tmp_path: Path) -> None:
    kept(tmp_path, BASELINE)
    other = replace(BASELINE, key="k3", reached={f"function f{n} in task.py": "2" for n in range(20)})
    assert " and 13 more)" in refusal(tmp_path, other)


def test_keys_of_another_kind_are_told_and_nothing_of_them_is_used(tmp_path: Path) -> None:
    storage = kept(tmp_path, BASELINE, STEP)
    old = storage.read_json("sweep.json")
    for step in old["steps"].values():
        del step["kind"], step["reached"]  # as the version wrote them that knew no kinds
    storage.write_json("sweep.json", {"steps": old["steps"]})
    new = replace(BASELINE, key="n0")
    said = refusal(tmp_path, new)
    assert f"are of another kind (1) than those of this version of bt_ray ({KIND}), so none of these steps is used" in said
    keys, finished = read_steps(storage)
    assert [key.kind for key in keys.values()] == [1, 1]
    assert set(finished) == {"", "p"}
    check_run_directory(str(tmp_path), {"": new}, accept_changes=True)
    prepare_run_directory(storage, CONFIG, {"": new})
    written = storage.read_json("sweep.json")
    assert (written["key_kind"], written["steps"][""]["kind"]) == (KIND, KIND)
    assert "" not in read_steps(storage)[1], "the finished baseline has a key of the old kind"

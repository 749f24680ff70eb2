"""A sweep computes nothing that another run directory has, on disk and in an object store."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import SUPPORT, scripted_sweep
from support.object_store import ObjectStore
from support.sole_sweep import sole_sweep
from support.sweep_files import toml
from typer.testing import CliRunner

import bt_ray
from bt_ray.cli import app
from bt_ray.driver import sweep as driver
from bt_ray.events import Stage
from bt_ray.report.data import read_report
from bt_ray.report.page import report_page
from bt_ray.run_dir.storage import open_storage

COUNTED = ["baseline", "p", "p -> w"]


@pytest.fixture(scope="module")
def before(s3: ObjectStore, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The settings of a sweep that is finished in its run directory, of which the bucket has a copy."""
    folder = tmp_path_factory.mktemp("reuse")
    settings = scripted_sweep(folder)
    settings["server"]["env"] = {}
    settings["task"] = f"{shutil.copy(SUPPORT / 'tasks.py', folder / 'tasks.py')}:counted"
    sole_sweep(settings, "p -> w")
    assert computed(settings) == COUNTED
    open_storage("s3://bucket/reuse").upload(Path(settings["run_dir"]), "before", last="sweep.json")
    return settings


def computed(settings: dict[str, Any]) -> list[str]:
    """What all sweeps computed so far."""
    return Path(settings["task"].rpartition(":")[0]).with_name("computed.txt").read_text().split("\n")[:-1]


def location(settings: dict[str, Any], place: str, tmp_path: Path, name: str = "run") -> str:
    if place == "disk":
        return str(tmp_path / name)
    return f"s3://bucket/{tmp_path.name}/{name}"


@pytest.mark.parametrize(
    ("source", "target", "how"),
    [("disk", "disk", "copy"), ("s3", "disk", "reference"), ("disk", "s3", "copy"), ("s3", "s3", "copy")],
)
def test_what_another_run_directory_has_is_not_computed(
    before: dict[str, Any], source: str, target: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = before["run_dir"] if source == "disk" else "s3://bucket/reuse/before"
    run_dir, said = location(before, target, tmp_path), list[Any]()
    monkeypatch.setattr(driver, "connected", lambda *of: pytest.fail("nothing is to be computed"))
    config = {**before, "strategies": ["p -> w", "p"], "run_dir": run_dir, "reuse": [other], "reuse_weights": how}
    result = bt_ray.sweep(before["task"], config, listener=said.append)
    assert [candidate.score for candidate in result.candidates] == [70.0, 40.0, 40.0, 20.0, 20.0]
    assert {candidate.origin for candidate in result.candidates} == {other}
    told = [event.text for event in said if isinstance(event, Stage)]
    (taken,) = [text for text in told if "taken" in text]
    assert taken.startswith(f"3 steps are taken from {other}, with 1 fine-tune")
    assert told.index(taken) < told.index("3 of 3 steps are finished already, the baseline included")
    assert computed(before) == COUNTED
    written = bt_ray.SweepResult.read(f"{run_dir}/result.json")
    assert {candidate.origin for candidate in written.candidates} == {other}
    listed = CliRunner().invoke(app, ["steps", run_dir])
    assert listed.output.count(", from (1)") == 3
    assert listed.output.endswith(f"(1) {other}\n")
    assert report_page(read_report(open_storage(run_dir))).count(f"Taken from {other}, where it was computed.") == 3

    program = written.candidates[0].load()
    assert program(question="number 26").answer == "52", "skill 5 and two demos"
    program.lm.kill()


@pytest.mark.usefixtures("local_ray")
def test_what_no_other_has_is_computed_on_what_they_have(before: dict[str, Any], tmp_path: Path) -> None:
    config = {**before, "strategies": ["p -> w -> p"], "run_dir": str(tmp_path / "run"), "reuse_weights": "reference"}
    config |= {"reuse": [before["run_dir"], "s3://bucket/reuse/before"], "task": before["task"]}
    sweep_toml = tmp_path / "sweep.toml"
    sweep_toml.write_text(toml({**config, "server": {**before["server"], "cpus": 0.5}}))
    for command in ("check", "plan"):
        told = CliRunner().invoke(app, [command, str(sweep_toml)])
        assert told.exit_code == 0, told.output
        assert f"3 steps are taken from {before['run_dir']}" in told.output
        assert "No step is taken from s3://bucket/reuse/before: it has none of those that are missing" in told.output
    assert "Finished already: 3. To compute: 1, 0 of them fine-tune." in told.output
    planned = json.loads(CliRunner().invoke(app, ["plan", str(sweep_toml), "--json"]).output)["steps"]
    assert [step["origin"] for step in planned] == [before["run_dir"]] * 3 + [""]

    known = computed(before)
    result = bt_ray.sweep(before["task"], config)
    assert computed(before) == [*known, "p -> w -> p"]
    (trial,) = result.trials
    assert [candidate.origin for candidate in trial.candidates] == [before["run_dir"]] * 3 + [""]
    assert [candidate.score for candidate in trial.candidates] == [20.0, 40.0, 70.0, 70.0]
    assert not list((tmp_path / "run" / "weights").glob("*/*.safetensors")), "they stay where they are"

    for name in before["run_dir"], str(tmp_path / "run"):
        assert CliRunner().invoke(app, ["prune", name, "--yes"]).exit_code == 0
    assert bt_ray.load(tmp_path / "run", candidate="p -> w").demos, "prune took nothing that is needed"
    moved = shutil.move(Path(before["run_dir"]) / "weights", tmp_path / "moved")
    try:
        with pytest.raises(bt_ray.BtRayError, match=r'The weights of candidate "p -> w" were removed.* are gone, to which '):
            bt_ray.load(tmp_path / "run", candidate="p -> w")
    finally:
        shutil.move(moved, Path(before["run_dir"]) / "weights")


def test_a_directory_that_is_none_of_a_sweep_is_told_by_the_check(before: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "sweep.toml").write_text(toml({**before, "run_dir": str(tmp_path / "run"), "reuse": ["yesterday"]}))
    told = CliRunner().invoke(app, ["check", str(tmp_path / "sweep.toml")])
    assert told.exit_code == 2
    assert f"reuse: {tmp_path / 'yesterday'} is no run directory of a sweep" in told.output

"""Measure what a sweep saves against a loop over `dspy.BetterTogether`, and how far it is from the best schedule.

    python scripts/bench_sweep.py real --model models/SmolLM2-135M-Instruct     # about 50 minutes on two cores
    python scripts/bench_sweep.py set-times --slots 1 2 4 8 --repeats 5

`real`: the demo's task and settings on real vLLM, six strategies. First as one would do it without bt_ray: one strategy
after the other, a server that is stopped before each fine-tune and started after it, and the same trainer, with all cores;
only DSPy's cache knows anything of the strategies before.
Then the sweep. Each side is a process of its own with an empty DSPy cache.

`set-times`: all strategies of `p` and `w` up to a length, with scripted servers that answer one request at a time, and
trainings that sleep, so that it is known how long each step takes. The makespan, from the first step's start to the last
one's end, stands beside the best possible one: found by trying all schedules up to 15 steps, else what none can beat. And
beside what `scripts/simulate.py` says with the times that the first sweep took: that line tells nothing of it.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
SUPPORT = ROOT / "tests" / "support"
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "scripts")]

from simulation.measured import busy_seconds, held_leases, measured  # noqa: E402 - the path comes first
from simulation.schedules import best_makespan, trains  # noqa: E402
from simulation.sweep import Simulation, Switches, Times  # noqa: E402

from bt_ray.strategy import BASELINE, all_prefixes, every, prefixes  # noqa: E402

ACTORS = {"ImplicitFunc": "a trial", "ServerPool": "pool", "StepClaims": "claims", "ModelServer": "a server's actor"}
"""What Ray calls a sweep's processes, and what they are."""
SIX = ["p", "w", "p -> w", "w -> p", "p -> w -> p", "w -> p -> w"]
EXAMPLES = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    real = kinds.add_parser("real")
    real.add_argument("--model", type=Path, required=True)
    real.add_argument("--strategies", nargs="+", default=SIX)
    real.add_argument("--side", choices=["loop", "sweep"], help="only this one")
    real.add_argument("--gpus", type=int, default=0, help="one for each server of the sweep; the loop has one")
    set_times = kinds.add_parser("set-times")
    set_times.add_argument("--slots", type=int, nargs="+", default=[1, 2, 4, 8])
    set_times.add_argument("--repeats", type=int, default=5)
    set_times.add_argument("--max-length", type=int, default=3)
    set_times.add_argument("--evaluate", type=float, default=20.0, help="seconds of an evaluation (default: %(default)s)")
    set_times.add_argument("--train", type=float, nargs="+", default=[0.0, 30.0], help="of a training; each is a case")
    child = kinds.add_parser("child")
    child.add_argument("side", choices=["loop", "sweep"])
    child.add_argument("settings", type=Path)
    options = parser.parse_args()
    if options.kind == "child":
        found = (looped if options.side == "loop" else swept)(json.loads(options.settings.read_text()))
        options.settings.with_suffix(".found.json").write_text(json.dumps(found))
    elif options.kind == "real":
        sides = [options.side] if options.side else ["loop", "sweep"]
        compare_real(options.model.resolve(), options.strategies, sides, options.gpus)
    else:
        compare_set_times(options)


def compare_real(model: Path, strategies: Sequence[str], sides: Sequence[str], gpus: int) -> None:
    iris = ROOT / "scripts" / "iris"
    values = tomllib.loads((iris / "sweep.toml").read_text())
    values |= {"task": f"{iris / 'task.py'}:build", "model": str(model), "strategies": list(strategies)}
    found = {}
    for side in sides:
        server = {"count": 1, "threads": os.cpu_count()} if side == "loop" else {}
        if gpus:
            server = {"count": 1 if side == "loop" else gpus, "gpus": 1}
        found[side] = run(side, {**values, "server": {**values["server"], **server}})
        wall, scores = found[side]["wall_s"], found[side]["scores"]
        print(f"\n{side}: {wall:.0f} s, {found[side]['starts']} starts of vLLM, {found[side]['steps']} steps", flush=True)
        for strategy in strategies:
            steps = [f"{s:.1f}" for s in scores[strategy]]
            print(f"  {strategy:<12} {' '.join(steps)}", flush=True)
    if len(found) == len(("loop", "sweep")):
        best = {side: max(score for scores in of["scores"].values() for score in scores) for side, of in found.items()}
        print(f"\nwall time, sweep / loop  {found['sweep']['wall_s'] / found['loop']['wall_s']:.3f}")
        print(f"best score               sweep {best['sweep']:.1f} %, loop {best['loop']:.1f} %")
        print(f"idle share of the slots  {found['sweep']['idle']:.0%}")
    if "sweep" in found:
        print(f"resident memory          {shown(found['sweep']['memory'])}")


def shown(memory: Mapping[str, float]) -> str:
    return ", ".join(f"{kind} {size:.0f} MB" for kind, size in memory.items())


def compare_set_times(options: argparse.Namespace) -> None:
    strategies = every("pw", options.max_length)
    steps = [BASELINE, *all_prefixes(strategies)]
    one_by_one = [step for strategy in strategies for step in [BASELINE, *prefixes(strategy)]]
    print(f"{len(strategies)} strategies, {len(steps)} steps; an evaluation takes {options.evaluate:g} s.")
    print("slots  training   makespan  of           best    ratio   idle  starts  loop / sweep  simulated")
    times: Times | None = None
    for train_s in options.train:
        seconds = {step: options.evaluate + (train_s if trains(step) else 0.0) for step in steps}
        sequential = sum(seconds[step] for step in one_by_one)
        for slots in options.slots:
            best = best_makespan(seconds, slots)
            found = [run("sweep", scripted(strategies, slots, options.evaluate, train_s)) for _ in range(options.repeats)]
            spans = sorted(of["makespan_s"] for of in found)
            span = statistics.median(spans)
            idle, starts = (statistics.median(of[what] for of in found) for what in ("idle", "starts"))
            between = f"{spans[0]:.0f} - {spans[-1]:.0f}"
            line = f"{slots:5}  {train_s:6g} s  {span:7.1f} s  {between:<11}{best:6.1f} s  {span / best:.3f}  {idle:5.0%}"
            told = "       -"
            if times is not None:
                expected = predicted(strategies, slots, replace(times, train=times.train + train_s - options.train[0]))
                told = f"{expected:6.1f} s, {expected / span - 1:+.1%}"
            else:
                times = Times(**found[0]["times"])
            print(f"{line}  {starts:6g}  {sequential / span:12.2f}  {told}", flush=True)
    print(f"resident memory: {shown(found[-1]['memory'])}")


def predicted(strategies: Sequence[str], slots: int, times: Times) -> float:
    """The simulated makespan, from the first step's start."""
    return Simulation(strategies, slots, replace(times, spread=0.0), Switches(), seed=0).run().makespan - times.trial


def scripted(strategies: Sequence[str], slots: int, evaluate_s: float, train_s: float) -> dict[str, Any]:
    """Settings of a sweep whose steps take known times."""
    env = {"SCRIPTED_DELAY_S": str(evaluate_s / EXAMPLES), "SCRIPTED_AT_ONCE": "1", "SCRIPTED_TRAIN_S": str(train_s)}
    return {
        "task": f"{SUPPORT / 'tasks.py'}:without_testset",
        "strategies": list(strategies),
        "num_threads": EXAMPLES,
        "server": {
            "count": slots,
            "cpus": 0.1,
            "command": [sys.executable, str(SUPPORT / "scripted_server.py")],
            "env": env,
        },
        "train": {"command": [sys.executable, str(SUPPORT / "scripted_trainer.py")]},
    }


def run(side: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Run one side in a process of its own, in an empty folder with an empty cache; what it found."""
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder, "settings.json")
        if "model" not in values:
            from support.scripted_model import write_model

            write_model(Path(folder, "scripted-model"), skill=2)
            values = {**values, "model": f"{folder}/scripted-model"}
        settings.write_text(json.dumps({**values, "run_dir": f"{folder}/run"}))
        env = {**os.environ, "DSPY_CACHEDIR": f"{folder}/dspy_cache", "BT_RAY_CACHE": f"{folder}/cache"}
        log = Path(folder, "log.txt")
        with log.open("w") as output:
            command = [sys.executable, str(Path(__file__)), "child", side, str(settings)]
            done = subprocess.run(command, env=env, stdout=output, stderr=output, check=False)
        if done.returncode:
            sys.exit(log.read_text()[-3000:])
        found: dict[str, Any] = json.loads(settings.with_suffix(".found.json").read_text())
        return found


def swept(values: dict[str, Any]) -> dict[str, Any]:
    """The sweep."""
    began = time.monotonic()
    import ray

    import bt_ray
    from bt_ray.driver.ray_session import DRIVER_ENVIRONMENT

    os.environ |= DRIVER_ENVIRONMENT
    ray.init(address="local", num_cpus=max(os.cpu_count() or 1, 8), include_dashboard=False, log_to_driver=False)
    with peak_memory() as peaks:
        result = bt_ray.sweep(values["task"], values)
    wall_s = time.monotonic() - began
    candidates = [candidate for trial in result.trials for candidate in trial.candidates]
    started = min(candidate.started for candidate in candidates)
    manifests = [json.loads(file.read_text()) for file in Path(values["run_dir"]).glob("steps/*/manifest-*.json")]
    ended = max(manifest["started"] + manifest["seconds"] for manifest in manifests)
    events = [json.loads(line) for line in Path(values["run_dir"], "events.jsonl").read_text().splitlines()]
    busy = busy_seconds(held_leases(events))
    return {
        "wall_s": wall_s,
        "makespan_s": ended - started,
        "idle": 1 - busy / (values["server"]["count"] * (ended - started)),
        "starts": sum(event.get("state") == "serving, start" for event in events),
        "steps": len(manifests),
        "memory": peaks,
        "times": asdict(measured(Path(values["run_dir"]))),
        "scores": {trial.strategy: [candidate.score for candidate in trial.candidates] for trial in result.trials},
    }


@contextmanager
def peak_memory() -> Iterator[dict[str, float]]:
    """The most resident memory of this process and of the sweep's actors, in MB, by kind; of trials, that of the largest."""
    peaks: dict[str, float] = {}
    ended = threading.Event()
    driver = psutil.Process()

    def note(process: psutil.Process) -> None:
        title = "".join(process.cmdline()[:1])
        actor = next((kind for name, kind in ACTORS.items() if title.startswith(f"ray::{name}")), None)
        kind = "driver" if process == driver else actor
        if kind is not None:
            peaks[kind] = max(peaks.get(kind, 0.0), process.memory_info().rss / 1e6)

    def watch() -> None:
        while not ended.wait(1):
            for process in [driver, *driver.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):  # it has ended
                    note(process)

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    yield peaks
    ended.set()
    watching.join()


def looped(values: dict[str, Any]) -> dict[str, Any]:
    """`dspy.BetterTogether` for one strategy after the other, with one server that is started anew for each weights."""
    began = time.monotonic()
    from support.reference import Reference, reference_run
    from support.slot_models import SlotModels

    from bt_ray.settings.config import make_config
    from bt_ray.slot.slot import Slot
    from bt_ray.task.task import load_task
    from bt_ray.task.teachers import stand_in_for
    from bt_ray.trial.lm import assign_lm

    starts = 0
    served = Slot.serve

    def counted(slot: Slot, *arguments: Any) -> Any:
        nonlocal starts
        endpoint = served(slot, *arguments)
        starts += slot.change.how == "start"
        assert slot.change.how != "swap"
        return endpoint

    Slot.serve = counted  # type: ignore[method-assign]

    class Loop(Reference):
        """Its gold-label teacher makes prompts as the student is asked with, as in a sweep."""

        def _run_and_evaluate_step(self, optimizer: Any, student: Any, *arguments: Any) -> Any:
            stand_in_for(student, arguments[3].get("teacher"))
            return super()._run_and_evaluate_step(optimizer, student, *arguments)

    config = make_config(values)
    scores: dict[str, list[float]] = {}
    for number, strategy in enumerate(values["strategies"]):
        models = SlotModels(config, Path(values["run_dir"], str(number)))  # no fine-tune is known from before
        models.finetune = stopping_first(models)  # type: ignore[method-assign]
        task, lm = load_task(config.task, {}), models.lm()
        assign_lm(task.program, lm)
        chosen = {"num_threads": config.num_threads, "max_errors": config.max_errors}
        program = reference_run(task, lm, config.seed, Loop, strategy=strategy, **chosen)
        found = {of["strategy"]: of["score"] for of in program.candidate_programs}
        scores[strategy] = [found[prefix] for prefix in [BASELINE, *prefixes(strategy)]]
        models.close()
        print(strategy, scores[strategy], f"{time.monotonic() - began:.0f} s", flush=True)
    steps = sum(len(of) for of in scores.values())
    return {"wall_s": time.monotonic() - began, "starts": starts, "steps": steps, "scores": scores}


def stopping_first(models: Any) -> Any:
    """Its `finetune`, before which the server is stopped, as one does whose server cannot go to other weights."""
    finetune = models.finetune

    def stopped(weights_id: str, *arguments: Any) -> Any:
        models.kill(weights_id)
        return finetune(weights_id, *arguments)

    return stopped


if __name__ == "__main__":
    main()

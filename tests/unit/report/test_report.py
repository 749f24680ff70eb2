"""Progress and table, drawn on a console without a machine behind it."""

import io
import re
from typing import Any

from rich.console import Console

from bt_ray.events import ServerChanged, ServerReplaced, Stage, StepFinished, TrialEnded, TrialStarted, TrialWaits
from bt_ray.report.progress import Progress
from bt_ray.report.table import result_table, spread_table, summary_lines
from bt_ray.run_dir.results import Candidate, Expected, SweepResult, TrialResult

EVENTS = [
    Stage("Running 2 strategies"),
    TrialWaits("p", "seed=1"),
    TrialStarted("p -> w"),
    TrialStarted("w [x]"),
    StepFinished("p -> w", "", 0.0, 0.0, 12.0),
    ServerChanged(0, "training", "m-ft-1", "trial p -> w", "step 3/100, loss 0.3"),
    ServerChanged(0, "training", "m-ft-1", "trial p -> w", "step 4/100, loss 0.2"),
    ServerReplaced(0, "its actor died"),
    StepFinished("p -> w", "p", 36.0, 36.0, 100.0),
    StepFinished("p", "", 20.0, 20.0, 3.0, loaded=True, variant="seed=1"),
    TrialEnded("w [x]", "RuntimeError: no [y]"),
]


def shown(*, terminal: bool) -> str:
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=120, color_system=None)
    with Progress(console) as progress:
        for event in EVENTS:
            progress(event)
    return output.getvalue()


def test_without_a_terminal_each_event_is_a_plain_line() -> None:
    lines = [line.partition("] ")[2] for line in shown(terminal=False).splitlines()]
    assert lines == [
        "Running 2 strategies",
        'strategy "p -> w": started',
        'strategy "w [x]": started',
        'strategy "p -> w": baseline 0.0 % (best 0.0 %), in 12 s',
        "server 0: training m-ft-1 for trial p -> w, step 3/100, loss 0.3",
        "server 0: restarted: its actor died",
        'strategy "p -> w": step p 36.0 % (best 36.0 %), in 100 s',
        'strategy "p" [seed=1]: baseline 20.0 % (best 20.0 %), already computed',
        'strategy "w [x]": ended early: RuntimeError: no [y]',
    ]


def test_in_a_terminal_a_live_table_shows_every_trial_and_server() -> None:
    text = shown(terminal=True)
    for part in (
        "Running 2 strategies",
        "0.0 %, 36.0 %",
        "step p -> w",
        "ended early: RuntimeError: no [y]",
        "step 4/100",
        "its actor",
    ):
        assert part in text


def test_the_table_has_a_row_for_each_strategy_and_words_for_the_winner() -> None:
    def candidate(prefix: str, score: float, **test: Any) -> Candidate:
        return Candidate("p -> w", prefix, score, (), 0.0, 60.0, {}, f"{prefix}/program.json", **test)

    test = {"test_score": 94.0, "test_example_scores": (1.0,) * 47 + (0.0,) * 3}
    done = TrialResult("p -> w", (candidate("", 0.0), candidate("p", 36.0), candidate("p -> w", 96.0, **test)))
    failed = TrialResult("w [x]", (), "RuntimeError: no [y]\nmore", "Traceback ...")
    result = SweepResult("/runs/x", (done, failed), 120.0)
    output = io.StringIO()
    Console(file=output, width=120, color_system=None).print(result_table(result))
    assert "│ p -> w   │    0.0 % │ 36.0 % │ 96.0 % │ 96.0 % │         94.0 % │     3.0 │" in output.getvalue()
    assert "RuntimeError: no [y]" in output.getvalue()
    assert summary_lines(result)[:2] == [
        'Best program: "p -> w", 96.0 % on the valset.',
        "On the testset, 50 examples that no step saw, evaluated once: 94.0 % (95 % confidence: 86 to 100 %).",
    ]
    assert summary_lines(SweepResult("/runs/x", (failed,), 1.0)) == ["No strategy got as far as its baseline."]


def test_seeds_of_a_strategy_are_summed_up() -> None:
    def trial(seed: int, rate: float, score: float) -> TrialResult:
        candidate = Candidate("w", "w", score, (), 0.0, 60.0, {}, "program.json")
        return TrialResult("w", (candidate,), settings={"seed": seed, "train.learning_rate": rate})

    trials = (trial(0, 0.1, 50.0), trial(1, 0.1, 70.0), trial(0, 0.2, 40.0), trial(1, 0.2, 40.0))
    output = io.StringIO()
    Console(file=output, width=120, color_system=None).print(spread_table(SweepResult("runs/x", trials, 60.0)))
    rows = [re.sub("[^\\w.=%]+", " ", line).strip() for line in output.getvalue().splitlines()]
    assert "w train.learning_rate=0.1 2 60.0 % 14.1 50.0 % 70.0 %" in rows
    assert "w train.learning_rate=0.2 2 40.0 % 0.0 40.0 % 40.0 %" in rows
    assert spread_table(SweepResult("runs/x", trials[:1], 60.0)) is None


def test_a_search_says_what_it_did_not_try_and_what_may_be_luck() -> None:
    trial = TrialResult("p", (Candidate("p", "p", 62.0, (), 0.0, 60.0, {}, "program.json"),))
    skipped = (Expected("p -> w", 70.0, 4.0, "the budget of 5 steps was spent"),)
    lines = summary_lines(SweepResult("runs/x", (trial,), 60.0, skipped=skipped, believed=Expected("w", 61.0, 1.5)))
    assert 'the search expects more of "w", 61.0 ± 1.5 %.' in " ".join(lines)
    assert 'The most promising: "p -> w", 70.0 ± 4.0 %.' in " ".join(lines)

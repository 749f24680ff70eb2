"""The table at the end of a sweep."""

from collections.abc import Mapping, Sequence
from statistics import mean, stdev

from rich.table import Table
from rich.text import Text

from bt_ray.report.comparison import interval, verdict
from bt_ray.run_dir.results import Candidate, SweepResult
from bt_ray.strategy import length, variant_name


def result_table(result: SweepResult) -> Table:
    """Every strategy with the scores of its steps, the best in bold."""
    table = Table(title="Scores on the valset, in percent", title_justify="left")
    table.add_column("strategy", no_wrap=True)
    steps = max((length(trial.strategy) for trial in result.trials), default=0)
    table.add_column("baseline", justify="right")
    for step in range(1, steps + 1):
        table.add_column(f"step {step}", justify="right")
    table.add_column("best", justify="right")
    tested = any(trial.best is not None and trial.best.test_score is not None for trial in result.trials)
    if tested:
        table.add_column("on the testset", justify="right")
    table.add_column("minutes", justify="right")
    failed = any(trial.error for trial in result.trials)
    if failed:
        table.add_column("ended early by", overflow="fold")
    for trial in result.trials:
        by_length = {length(candidate.prefix): candidate for candidate in trial.candidates}
        scores = [_score(by_length.get(step), result.best) for step in range(steps + 1)]
        minutes = sum(candidate.seconds for candidate in trial.candidates) / 60
        best = percent(trial.best.score) if trial.best else "-"
        error = trial.error.splitlines()[0] if trial.error else ""
        name = trial_label(trial.strategy, variant_name(trial.settings))
        test = [percent(trial.best.test_score if trial.best is not None else None, missing="-")] if tested else []
        table.add_row(Text(name), *scores, best, *test, f"{minutes:.1f}", *([Text(error)] if failed else []))
    return table


def spread_table(result: SweepResult) -> Table | None:
    """The best score of each strategy over seeds, where there are several: mean, standard deviation, and range."""
    groups: dict[str, list[float]] = {}
    for trial in result.trials:
        if "seed" in trial.settings and trial.best is not None and trial.best.score is not None:
            others = {key: value for key, value in trial.settings.items() if key != "seed"}
            groups.setdefault(trial_label(trial.strategy, variant_name(others)), []).append(trial.best.score)
    if max(map(len, groups.values()), default=0) < 2:
        return None
    table = Table(title="Best scores over seeds, in percent", title_justify="left")
    table.add_column("strategy", no_wrap=True)
    for column in ("seeds", "mean", "sd", "lowest", "highest"):
        table.add_column(column, justify="right")
    for name, scores in groups.items():
        spread = f"{stdev(scores):.1f}" if len(scores) > 1 else "-"
        table.add_row(
            Text(name), str(len(scores)), percent(mean(scores)), spread, percent(min(scores)), percent(max(scores))
        )
    return table


def trial_label(strategy: str, variant: str) -> str:
    """A trial as people see it."""
    return f"{strategy} [{variant}]" if variant else strategy


def errors_in_words(errors: Mapping[str, int]) -> str:
    """How many examples scored 0 because of an error, with the most frequent one."""
    first = max(errors, key=errors.__getitem__)
    others = "" if len(errors) == 1 else f", and {len(errors) - 1} other kinds"
    return f"{sum(errors.values())} examples scored 0 because of an error: {first}{others}"


def summary_lines(result: SweepResult) -> list[str]:
    """The winner in words."""
    if result.best is None:
        return ["No strategy got as far as its baseline."]
    name, under = result.best.prefix or "baseline", f" with {result.best.variant}" if result.best.variant else ""
    lines = [f'Best program: "{name}"{under}, {percent(result.best.score)} on the valset.']
    if (test := result.best.test_score) is not None:
        count = len(result.best.test_example_scores)
        within = _within(result.best.test_example_scores)
        lines.append(f"On the testset, {count} examples that no step saw, evaluated once: {percent(test)}{within}.")
    if result.valsets > 1:
        lines.append(describe_mixed_valsets(result.valsets))
    if (compared := verdict(result)) is not None:
        lines.append(compared.sentence)
    if (believed := result.believed) is not None and believed.prefix != result.best.prefix:
        lines.append(
            f"That score may be luck: judging by related steps, the search expects more of "
            f'"{believed.prefix or "baseline"}", {believed.score:.1f} ± {believed.spread:.1f} %.'
        )
    if result.skipped:
        first = result.skipped[0]
        lines.append(
            f"Not tried: {len(result.skipped)} possible next steps, since {first.reason}. The most promising: "
            f'"{first.prefix}", {first.score:.1f} ± {first.spread:.1f} %. result.json has all of them.'
        )
    lines.append(f'Kept in {result.run_dir}/best; bt_ray.load("{result.run_dir}/best") opens it.')
    lines.append(f"The sweep took {result.seconds / 60:.1f} minutes.")
    return lines


def describe_mixed_valsets(valsets: int) -> str:
    """That a ranking goes over programs which were validated on different examples."""
    return (
        f"The ranking is over {valsets} different valsets, since settings of the space change the examples: a program may "
        "stand first because its examples are easier."
    )


def _score(candidate: Candidate | None, best: Candidate | None) -> Text:
    if candidate is None:
        return Text("-")
    return Text(percent(candidate.score), style="bold green" if candidate == best else "")


def _within(scores: Sequence[float]) -> str:
    found = interval(scores)
    return f" (95 % confidence: {found.low:.0f} to {found.high:.0f} %)" if found is not None else ""


def percent(score: float | None, missing: str = "not scored") -> str:
    return missing if score is None else f"{score:.1f} %"

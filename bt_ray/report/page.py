"""A sweep as one HTML page that needs nothing else: no network, no files beside it."""

import difflib
import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from bt_ray.report import figures
from bt_ray.report.data import Cost, Node, Predictor, Report
from bt_ray.report.state import headline
from bt_ray.report.table import describe_mixed_valsets, errors_in_words, percent, trial_label
from bt_ray.run_dir.examples import KeptExample
from bt_ray.run_dir.results import Candidate
from bt_ray.strategy import variant_name

TEMPLATE = "page.html.jinja"
NOTHING = Predictor("", ())


def report_page(report: Report) -> str:
    """The page's HTML."""
    loader = jinja2.FunctionLoader(lambda name: (files("bt_ray.report") / name).read_text(encoding="utf-8"))
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": percent, "cost": cost_in_words, "errors": errors_in_words}
    ranked = rank_nodes(report)
    plots = {
        "score-by-step": figures.score_by_step(report),
        "trie": figures.trie(report),
        "score-by-cost": figures.score_by_cost(report),
    }
    if report.segments:
        plots["timeline"] = figures.timeline(report)
    for node in ranked:
        if curves := [training.losses for training in node.trainings if training.losses]:
            plots[f"loss-{node.key}"] = figures.losses(curves)
    scored = [node for node in ranked if node.step is not None and node.step.example_scores]
    return environment.get_template(TEMPLATE).render(
        report=report,
        headline=headline(report.state, time.time()) if report.result is None else "",
        rows=[_row(report, trial) for trial in report.trials],
        ranked=ranked,
        mixed=describe_mixed_valsets(report.ranked_by) if report.ranked_by > 1 else "",
        parents=report.nodes,
        prompts={node.key: _prompts(node, report.nodes.get(node.parent)) for node in ranked},
        scored=scored,
        plotly=get_plotlyjs(),
        plots=_as_script({name: json.loads(figure.to_json()) for name, figure in plots.items()}),
        plotted=set(plots),
        examples=_as_script(_examples(report, scored)),
    )


def rank_nodes(report: Report) -> list[Node]:
    """The finished steps, the best first."""
    finished = [node for node in report.nodes.values() if node.step is not None]
    return sorted(finished, key=lambda node: -_sortable(node))


def _examples(report: Report, scored: Sequence[Node]) -> dict[str, Any]:
    """What tells where programs differ: their scores of each example, and the examples, each valset once."""
    valsets: dict[str, tuple[KeptExample, ...]] = {}
    found: dict[str, int] = {}
    for node in scored:
        kept = report.valsets.get(node.valset, ())
        if which := node.examples or (repr(kept) if kept else ""):
            valsets[which] = valsets.get(which) or kept
            found[node.key] = list(valsets).index(which)
    return {
        "scores": {node.key: node.step.example_scores for node in scored if node.step is not None},
        "labels": {node.key: node.label for node in scored},
        "valsets": [[asdict(example) for example in kept] for kept in valsets.values()],
        "valsetOf": found,
    }


def _sortable(node: Node) -> float:
    assert node.step is not None
    return node.step.score if node.step.score is not None else float("-inf")


@dataclass(frozen=True)
class Row:
    """A strategy in the ranking."""

    name: str
    best: Candidate | None
    node: Node | None
    error: str


def _row(report: Report, trial: Any) -> Row:
    by_program = {node.step.program: node for node in report.nodes.values() if node.step is not None}
    best = trial.best
    error = (trial.error or "").partition("\n")[0]
    name = trial_label(trial.strategy, variant_name(trial.settings))
    return Row(name, best, by_program.get(best.program) if best is not None else None, error)


@dataclass(frozen=True)
class Prompt:
    """A predictor's prompt beside its parent's: the words, each with whether it is the other's too."""

    name: str
    before: Sequence[tuple[bool, str]]
    after: Sequence[tuple[bool, str]]
    is_changed: bool
    demos: Sequence[Any]
    demo_fields: Sequence[str]


def _prompts(node: Node, parent: Node | None) -> list[Prompt]:
    prompts = []
    for name, predictor in node.predictors.items():
        above = parent.predictors.get(name, NOTHING) if parent is not None else predictor
        before, after = word_diff(above.instructions, predictor.instructions)
        shown = list(dict.fromkeys(field for demo in predictor.demos for field in demo if field != "augmented"))
        changed = above.instructions != predictor.instructions
        prompts.append(Prompt(name, before, after, changed, predictor.demos, shown))
    return prompts


def word_diff(before: str, after: str) -> tuple[list[tuple[bool, str]], list[tuple[bool, str]]]:
    """Both texts in pieces, each with whether the other text has it too."""
    ours, theirs = (re.findall(r"\s+|\w+|[^\w\s]", text) for text in (before, after))
    left, right = [], []
    for kind, a, b, c, d in difflib.SequenceMatcher(a=ours, b=theirs, autojunk=False).get_opcodes():
        if a < b:
            left.append((kind == "equal", "".join(ours[a:b])))
        if c < d:
            right.append((kind == "equal", "".join(theirs[c:d])))
    return left, right


def cost_in_words(cost: Cost) -> str:
    """Time, GPU time, requests, tokens and money, as far as there is any."""
    parts = [f"{cost.seconds / 60:.1f} min"]
    if cost.gpu_seconds:
        parts.append(f"{cost.gpu_seconds / 3600:.2f} GPU h")
    parts.append(f"{cost.requests} requests")
    parts.append(f"{cost.tokens_in} + {cost.tokens_out} tokens")
    if cost.money:
        parts.append(f"{cost.money:.2f} in money")
    return ", ".join(parts)


def _as_script(values: Any) -> str:
    """JSON that can stand in a script of a page, whatever texts are in it."""
    return json.dumps(values).replace("<", "\\u003c")

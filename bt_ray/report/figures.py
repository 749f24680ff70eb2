"""The plots of a report, as plotly's figures. Their colours of text and grid come from the page, light or dark."""

import datetime
from collections.abc import Sequence

import plotly.graph_objects as go

from bt_ray.report.data import Node, Report
from bt_ray.report.table import trial_label
from bt_ray.strategy import length, variant_name

STATE_COLOURS = {
    "waiting": "#b0b0b0",
    "starting": "#e69f00",
    "swapping": "#cc79a7",
    "serving": "#0072b2",
    "training": "#d55e00",
    "idle": "#56b4e9",
    "down": "#000000",
}
"""Told apart by people who see colours differently (M. Okabe and K. Ito, Color Universal Design, 2008)."""
NAMED_LINES = 12
"""How many strategies are named and coloured; where there are more, the others are thin lines behind them."""


def score_by_step(report: Report) -> go.Figure:
    """A line for each strategy: the score after each of its steps."""
    figure = go.Figure()
    ranked = sorted(report.trials, key=lambda trial: trial.best.rank_key if trial.best else (0.0, 0))
    for number, trial in enumerate(ranked):
        points = [(length(c.prefix), c.score, c.prefix or "baseline") for c in trial.candidates if c.score is not None]
        if not points:
            continue
        steps, scores, names = zip(*points, strict=True)
        named = number < NAMED_LINES
        figure.add_scatter(
            x=steps,
            y=scores,
            text=names,
            name=trial_label(trial.strategy, variant_name(trial.settings)),
            mode="lines+markers",
            showlegend=named,
            opacity=1.0 if named else 0.25,
            line={} if named else {"color": "gray", "width": 1},
            hovertemplate="%{text}: %{y:.1f} %<extra></extra>",
        )
    figure.update_xaxes(title="step", dtick=1)
    figure.update_yaxes(title="score on the valset, %")
    return figure


def trie(report: Report) -> go.Figure:
    """The steps below those that they started from, coloured by score."""
    nodes = list(report.nodes.values())
    scored = [node.step.score for node in nodes if node.step is not None and node.step.score is not None]
    figure = go.Figure(
        go.Icicle(
            ids=[node.key for node in nodes],
            labels=[f"<b>{node.optimizer}</b>" for node in nodes],
            parents=[node.parent if node.parent in report.nodes else "" for node in nodes],
            text=[_step_text(node) for node in nodes],
            texttemplate="%{label}<br>%{text}",
            hovertext=[f"{node.label}<br>{_step_text(node)}" for node in nodes],
            hoverinfo="text",
            marker={
                "colors": [_score(node) for node in nodes],
                "colorscale": "Blues",
                "cmin": min(scored, default=0.0) - 10.0,
                "cmax": max(scored, default=100.0) + 10.0,
                "line": {"width": 1},
            },
            tiling={"orientation": "h"},
            pathbar={"visible": False},
        )
    )
    figure.update_layout(margin={"l": 0, "r": 0, "t": 4, "b": 4})
    return figure


def timeline(report: Report) -> go.Figure:
    """What each model server did, and when."""
    figure = go.Figure()
    for state, colour in STATE_COLOURS.items():
        segments = [segment for segment in report.segments if segment.state == state]
        if not segments:
            continue
        figure.add_bar(
            y=[f"server {segment.server}" for segment in segments],
            x=[1000 * (segment.end - segment.start) for segment in segments],
            base=[datetime.datetime.fromtimestamp(segment.start, tz=datetime.UTC).isoformat() for segment in segments],
            text=[f"{state} {segment.weights_id}, {segment.end - segment.start:.0f} s" for segment in segments],
            textposition="none",
            hovertemplate="%{text}<extra></extra>",
            orientation="h",
            name=state,
            marker={"color": colour, "line": {"width": 0}},
        )
    figure.update_layout(barmode="overlay", bargap=0.3)
    figure.update_xaxes(type="date", title="time (UTC)")
    figure.update_yaxes(autorange="reversed")
    return figure


def score_by_cost(report: Report) -> go.Figure:
    """Each program's score by what all steps that led to it took, and the front of those that nothing cheaper beats."""
    on_gpus = report.total.gpu_seconds > 0
    points = sorted(
        ((node.path_cost.gpu_seconds if on_gpus else node.path_cost.seconds) / 60, node.step.score, node.label)
        for node in report.nodes.values()
        if node.step is not None and node.step.score is not None
    )
    front, best = [], float("-inf")
    for cost, score, label in points:
        if score > best:
            front.append((cost, score, label))
            best = score
    figure = go.Figure()
    for name, shown, style in (("programs", points, {"mode": "markers"}), ("front", front, {"mode": "lines+markers"})):
        figure.add_scatter(
            x=[cost for cost, _, _ in shown],
            y=[score for _, score, _ in shown],
            text=[label for _, _, label in shown],
            name=name,
            hovertemplate="%{text}: %{y:.1f} % for %{x:.1f}<extra></extra>",
            **style,
        )
    figure.update_xaxes(title="GPU minutes of all its steps" if on_gpus else "minutes of all its steps")
    figure.update_yaxes(title="score on the valset, %")
    return figure


def losses(curves: Sequence[Sequence[float]]) -> go.Figure:
    """The loss of each optimizer step of fine-tunes."""
    figure = go.Figure()
    for number, curve in enumerate(curves, start=1):
        figure.add_scatter(x=list(range(1, len(curve) + 1)), y=list(curve), mode="lines", name=f"fine-tune {number}")
    figure.update_xaxes(title="optimizer step")
    figure.update_yaxes(title="training loss", rangemode="tozero")
    figure.update_layout(showlegend=len(curves) > 1)
    return figure


def _score(node: Node) -> float | None:
    return node.step.score if node.step is not None else None


def _step_text(node: Node) -> str:
    if node.step is None:
        return "not finished"
    score = "not scored" if node.step.score is None else f"{node.step.score:.1f} %"
    return f"{score}, {node.cost.seconds:.0f} s"

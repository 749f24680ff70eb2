"""The steps of a plan, or of a run directory, as a tree, and a plan in words."""

from collections.abc import Mapping

from rich.markup import escape
from rich.tree import Tree

from bt_ray.report.plan import Plan
from bt_ray.report.table import percent
from bt_ray.run_dir.step_store import FinishedStep
from bt_ray.step import StepKey
from bt_ray.strategy import SEPARATOR


def step_tree(keys: Mapping[str, StepKey], finished: Mapping[str, FinishedStep]) -> Tree:
    """Each step below the one that it starts from.

    Args:
        keys: The steps by label, each after its parent.
        finished: The finished ones, by label.
    """
    root = Tree("steps")
    nodes: dict[str, Tree] = {"": root}
    origins = _origins(finished)
    for label, key in keys.items():
        if key.key not in nodes:
            nodes[key.key] = nodes.get(key.parent, root).add(escape(_label(label, key, finished.get(label), origins)))
    return root.children[0] if len(root.children) == 1 else root


def origin_lines(finished: Mapping[str, FinishedStep]) -> list[str]:
    """The run directories that steps were taken from, numbered as in the tree."""
    return [f"({number}) {location}" for location, number in _origins(finished).items()]


def _origins(finished: Mapping[str, FinishedStep]) -> dict[str, int]:
    found = dict.fromkeys(step.origin for step in finished.values() if step.origin)
    return {location: number for number, location in enumerate(found, start=1)}


def plan_lines(plan: Plan, evaluated: int, gpus: float) -> list[str]:
    """A plan in words.

    Args:
        plan: The plan.
        evaluated: Examples in one evaluation.
        gpus: GPUs of each server.
    """
    steps, baselines = plan.one_by_one
    new, estimate = plan.new, plan.estimate
    lines = [
        f"{len(plan.steps) - plan.baselines} steps and {plan.baselines} baseline{'s' if plan.baselines > 1 else ''}, shared "
        f"between strategies; one by one: {steps} and {baselines}.",
        f"Finished already: {len(plan.finished)}. To compute: {len(new)}, {len(plan.trainings)} of them fine-tune.",
    ]
    if not new:
        return [*lines, "Nothing is left to compute."]
    lines.append(f"Evaluations of {evaluated} examples: {len(new)}; in all at least {estimate.requests} requests.")
    if estimate.seconds:
        cost = f", {estimate.seconds / 3600 * gpus:.2f} GPU hours" if gpus else ""
        took = f"About {estimate.seconds / 60:.1f} server minutes{cost} and {estimate.tokens} tokens"
        lines.append(f"{took}, estimated from finished steps of the same optimizers.")
    if estimate.unknown:
        shown = ", ".join(f'"{prefix}"' if prefix else "the baseline" for prefix in estimate.unknown)
        lines.append(f"Not included, since no finished step shows what they take: the optimizers' requests in {shown}.")
    return lines


def _label(label: str, key: StepKey, step: FinishedStep | None, origins: Mapping[str, int]) -> str:
    _, bracket, variant = label.partition(" [")
    name = f"{key.prefix.rpartition(SEPARATOR)[2] or 'baseline'}{bracket}{variant}"
    if step is None:
        return f"{name}: to compute{', fine-tunes' if key.trains else ''}"
    fine_tunes = sorted({weights_id.partition("-ft-")[2] for weights_id in step.weights.values()} - {""})
    weights = f", weights {', '.join(f'ft-{name}' for name in fine_tunes)}" if fine_tunes else ""
    tokens = step.prompt_tokens + step.completion_tokens
    origin = f", from ({origins[step.origin]})" if step.origin else ""
    took = f"{step.seconds:.0f} s, {step.requests} requests, {tokens} tokens"
    return f"{name}: {percent(step.score)} in {took}{weights}{origin}"

"""Which nodes have room for model servers, and whether a cluster can ever hold a sweep. No DSPy: the pool asks."""

from collections.abc import Iterable, Mapping, Sequence

from bt_ray.errors import ResourcesError, amount
from bt_ray.settings.config import ServerConfig, SweepConfig
from bt_ray.weights import model_name

OF_TYPE = "accelerator_type:"
"""Begins the name of Ray's resource for nodes with GPUs of a type."""


def too_large(server: ServerConfig, nodes: Sequence[Mapping[str, float]]) -> str | None:
    """Why no node, even an idle one, has room for a server; None if one has."""
    fitting = [node for node in nodes if has_its_type(server, node)]
    if not fitting and server.accelerator_type is not None:
        types = sorted({name.removeprefix(OF_TYPE) for node in nodes for name in node if name.startswith(OF_TYPE)})
        return f"No node has GPUs of the type {server.accelerator_type}; the cluster has {', '.join(types) or 'none'}."
    for resource, needed in (("GPU", server.gpus), ("CPU", server.cpus)):
        largest = max((node.get(resource, 0) for node in fitting), default=0)
        if needed > largest:
            return (
                f"A server needs {amount(needed, resource)} on one node; the largest node has {amount(largest, resource)}."
            )
    return None


def has_its_type(server: ServerConfig, node: Mapping[str, float]) -> bool:
    """Whether a node has GPUs of the type that a server wants, if it wants one."""
    return server.accelerator_type is None or node.get(OF_TYPE + server.accelerator_type, 0) > 0


def check_resources(config: SweepConfig, nodes: Sequence[Mapping[str, float]], slots: Iterable[str] = ("",)) -> list[str]:
    """Check that a cluster can ever hold the sweep's servers and one trial.

    Args:
        config: The sweep's settings.
        nodes: The total resources of each node (`"CPU"`, `"GPU"`).
        slots: Whose slots the sweep uses, as `Checked.models_at_once` names them.

    Returns:
        Warnings: what is missing now, where `autoscaling` says that the cluster adds nodes.

    Raises:
        ResourcesError: A fixed cluster can never give it; the message names what is missing.
    """
    missing = _find_missing(config, nodes, {name: config.server.of(name) for name in slots})
    if missing is None:
        return []
    if config.autoscaling:
        return [f"{missing} The sweep waits for the cluster to grow."]
    raise ResourcesError(f"{missing} (If the cluster adds nodes by itself: autoscaling = true.)")


def _find_missing(
    config: SweepConfig, nodes: Sequence[Mapping[str, float]], servers: Mapping[str, ServerConfig]
) -> str | None:
    for server in servers.values():
        if (missing := too_large(server, nodes)) is not None:
            return missing
    free = [{**node, "CPU": node.get("CPU", 0), "GPU": node.get("GPU", 0)} for node in nodes]
    for slots, server in sorted(servers.items(), key=lambda item: (-item[1].gpus, item[1].accelerator_type is None)):
        placed = _place(server, free)
        if placed < server.count:
            table = next(
                (f'server.models."{model}"' for model in config.server.models if model_name(model) == slots), "server"
            )
            fewer = f"Set {table}.count to {placed}, or make" if placed else "Make"
            return (
                f"The sweep asks for {amount(server.count, 'server')} of {server.needs} each; the cluster has room for "
                f"{placed}. {fewer} the servers smaller."
            )
    trial = config.trial
    if sum(int(node["CPU"] / trial.cpus + 1e-9) for node in free) < trial.processes:
        total = sum(node.get("CPU", 0) for node in nodes)
        of_a_trial = "a trial" if trial.processes == 1 else f"each of a trial's {trial.processes} processes"
        asked = " and ".join(f"{amount(server.count, 'server')} of {server.needs} each" for server in servers.values())
        return (
            f"{asked} leave no {trial.cpus:g} CPU for {of_a_trial}: the cluster has {amount(total, 'CPU')}. Set "
            "server.cpus a little lower (server.threads stays what it is), or trial.cpus"
            f"{' or trial.processes' * (trial.processes > 1)}."
        )
    return None


def _place(server: ServerConfig, free: Sequence[dict[str, float]]) -> int:
    """Take room for a kind of servers from what is free, of each node that has it the smallest; returns for how many."""
    for placed in range(server.count):
        fits = [n for n in free if n["CPU"] >= server.cpus - 1e-9 and n["GPU"] >= server.gpus - 1e-9]
        node = min((n for n in fits if has_its_type(server, n)), key=lambda n: (n["GPU"], n["CPU"]), default=None)
        if node is None:
            return placed
        node["CPU"] -= server.cpus
        node["GPU"] -= server.gpus
    return server.count

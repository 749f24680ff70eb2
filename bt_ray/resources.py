"""Which nodes have room for a model server. No DSPy: the pool asks, whose process would otherwise load it for this alone."""

from collections.abc import Mapping, Sequence

from bt_ray.config import ServerConfig
from bt_ray.errors import amount

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

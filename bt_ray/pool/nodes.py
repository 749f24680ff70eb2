"""The nodes of the Ray cluster: their resources, and where a sweep's own actors are placed."""

from typing import Any

import ray

from bt_ray.pool.resources import OF_TYPE, too_large
from bt_ray.settings.config import ServerConfig

NEWS_S = 15.0
"""Seconds between two progress lines while something waits for room."""

# The pool takes a failed look at draining nodes for a cluster that is out of reach, so a Ray without this must fail here.
assert callable(ray._private.state.state.get_draining_nodes)


def node_resources() -> list[dict[str, float]]:
    """The resources of each node that is alive, used or not."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def free_resources() -> dict[str, float]:
    """The unused cores and GPUs of the cluster."""
    return {name: amount for name, amount in ray.available_resources().items() if name in ("CPU", "GPU")}


def find_draining_nodes() -> set[str]:
    """The ids of nodes that are being drained by a cloud, the autoscaler or an administrator."""
    return set(ray._private.state.state.get_draining_nodes())  # as Ray Train does; there is no public call


def beside_the_driver() -> Any:
    """Places a sweep's own actors on the driver's node, whose loss ends the sweep anyway."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Not soft: Ray places an actor that asks for no resources anywhere then.
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def can_never_come(server: ServerConfig) -> bool:
    """Whether the autoscaler says (its version 2 does) that it has no type of node for a server.

    It says the same of one that waits for a node which others use; but then there is a node that is large enough.
    """
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    if too_large(server, node_resources()) is None:
        return False
    client = ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
    state = GetClusterStatusReply.FromString(client.get_cluster_status(timeout_s=10)).autoscaling_state
    wanted, kind = {"CPU": server.cpus, "GPU": server.gpus}, f"{OF_TYPE}{server.accelerator_type}"
    bundles = [request.resources_bundle for request in state.infeasible_resource_requests]
    ours = [bundle for bundle in bundles if server.accelerator_type is None or kind in bundle]
    return any(all(bundle.get(name, 0) == amount for name, amount in wanted.items()) for bundle in ours)

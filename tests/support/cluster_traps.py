"""The traps in the files below `cluster/` that no schema sees.

Each is a function of a file that gives what would go wrong: nothing where the file is right.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bt_ray.errors import ResourcesError
from bt_ray.pool.resources import check_resources
from bt_ray.settings.config import SweepConfig
from support.cluster_files import Shipped, bt_ray_version, pinned

BUCKETS = ("s3://", "gs://")
GRACE_S = 300
"""What a step that is under way should have to finish, at least."""


# Of all files that run a sweep on a cluster.


def not_told_to_grow(file: Shipped) -> list[str]:
    """Without the setting, a sweep that begins with the head alone is refused: no node has a GPU yet."""
    return [] if file.sweep.autoscaling else ["the cluster adds nodes, and `autoscaling` is not set"]


def trials_end_with_their_node(file: Shipped) -> list[str]:
    """Workers are spot nodes, and a trial may have been placed on one."""
    return [] if file.sweep.trial.max_failures > 3 else ["`trial.max_failures` is for nodes that stay"]


def _wrong_image(image: str) -> bool:
    return re.fullmatch(rf"\S+/bt-ray:{re.escape(bt_ray_version())}-cuda", image) is None


def _room(config: SweepConfig, nodes: list[dict[str, float]]) -> list[str]:
    """What a sweep lacks on a cluster that has grown to its limit."""
    if not config.server.gpus:
        return ["a server that takes no GPU may be placed on the head"]
    try:
        return check_resources(config.model_copy(update={"autoscaling": False}), nodes)
    except ResourcesError as error:
        return [str(error)]


# Of Kubernetes manifests.


def gpu_on_the_head(file: Shipped) -> list[str]:
    head = file.cluster["headGroupSpec"]
    counted = head["rayStartParams"].get("num-gpus") != "0"
    taken = any("nvidia.com/gpu" in str(container.get("resources")) for container in file.pods[0]["containers"])
    return ["a model server may be placed on the head"] * counted + ["the head takes a GPU"] * taken


def no_token_from_a_secret(file: Shipped) -> list[str]:
    options = file.cluster.get("authOptions", {})
    return [] if options.get("mode") == "token" and options.get("secretName") else ["no token, or none of a Secret"]


def run_directory_goes_with_a_node(file: Shipped) -> list[str]:
    run_dir = file.sweep.run_dir or ""
    if run_dir.startswith(BUCKETS):
        return []
    return [
        f"{run_dir} is on no volume that all nodes share"
        for pod in file.pods
        for container in pod["containers"]
        if "persistentVolumeClaim" not in _volume_of(pod, container, run_dir)
    ]


def _volume_of(pod: Any, container: Any, path: str) -> Any:
    """The volume that `path` is on in a container; nothing where it is the container's own disk."""
    above = [mount for mount in container["volumeMounts"] if Path(path).is_relative_to(mount["mountPath"])]
    if not above:
        return {}
    name = max(above, key=lambda mount: len(mount["mountPath"]))["name"]
    return next(volume for volume in pod["volumes"] if volume["name"] == name)


def another_ray_than_the_image(file: Shipped) -> list[str]:
    images = {container["image"] for pod in file.pods for container in pod["containers"]}
    found = [] if len(images) == 1 else [f"nodes have different images: {sorted(images)}"]
    found += [f"{image} is not of this version" for image in images if _wrong_image(image)]
    version = file.cluster["rayVersion"]
    return found + [f"rayVersion is {version}, the image has {pinned('ray')}"] * (version != pinned("ray"))


def workers_that_always_cost(file: Shipped) -> list[str]:
    groups = file.cluster["workerGroupSpecs"]
    return [f"{group['groupName']} never goes to 0" for group in groups if group["minReplicas"] or group["replicas"]]


def old_autoscaler(file: Shipped) -> list[str]:
    cluster = file.cluster
    new = cluster.get("enableInTreeAutoscaling") and cluster.get("autoscalerOptions", {}).get("version") == "v2"
    return [] if new else ["no autoscaler, or the old one"]


def servers_without_room(file: Shipped) -> list[str]:
    nodes = [{"CPU": float(file.cluster["headGroupSpec"]["rayStartParams"]["num-cpus"])}]
    for group in file.cluster["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        nodes += [{"CPU": float(limits["cpu"]), "GPU": float(limits["nvidia.com/gpu"])}] * group["maxReplicas"]
    return _room(file.sweep, nodes)


def little_shared_memory(file: Shipped) -> list[str]:
    volumes = [_volume_of(pod, container, "/dev/shm") for pod in file.pods[1:] for container in pod["containers"]]
    return ["/dev/shm is not in memory"] * any(volume.get("emptyDir", {}).get("medium") != "Memory" for volume in volumes)


def steps_cut_off(file: Shipped) -> list[str]:
    found = []
    for pod in file.pods[1:]:
        grace = pod.get("terminationGracePeriodSeconds", 30)
        found += [f"a step has {grace} s to finish"] * (grace < GRACE_S)
        hooks = [str(container.get("lifecycle", {}).get("preStop")) for container in pod["containers"]]
        found += ["a pod that is to go ends its server at once"] * any("ray::ModelServer" not in hook for hook in hooks)
        found += ["the node is drained for another time"] * any(f"seconds {grace}" not in hook for hook in hooks)
    return found


def root_in_a_pod(file: Shipped) -> list[str]:
    return ["a pod runs as root"] * any(not pod.get("securityContext", {}).get("runAsNonRoot") for pod in file.pods)


def a_lost_head_is_the_end(file: Shipped) -> list[str]:
    spec = file.value["spec"]
    found = [] if spec.get("backoffLimit", 0) > 0 else ["a job that lost its head is not tried again"]
    return found + ["the operator waits for the lost job"] * (spec.get("submissionMode") != "SidecarMode")


def a_cluster_that_stays(file: Shipped) -> list[str]:
    return [] if file.value["spec"].get("shutdownAfterJobFinishes") else ["the cluster outlives its job"]


def data_that_goes_with_the_cluster(file: Shipped) -> list[str]:
    return ["`kubectl delete -f` removes the run directory"] * ("kind: PersistentVolumeClaim" in file.text)


# Of `ray up` files.


def gpu_on_the_head_node(file: Shipped) -> list[str]:
    head = file.value["available_node_types"][file.value["head_node_type"]]
    counted = head["resources"].get("GPU") != 0
    taken = re.match(r"(g|p)\d|a\d-", head["node_config"].get("InstanceType", head["node_config"].get("machineType")))
    return ["a model server may be placed on the head"] * counted + ["the head takes a GPU"] * bool(taken)


def no_token_on_the_nodes(file: Shipped) -> list[str]:
    asked = "--env=RAY_AUTH_MODE=token" in file.value["docker"].get("run_options", [])
    there = file.value.get("file_mounts", {}).get("/home/ray/.ray/auth_token") == "~/.ray/auth_token"
    return ["Ray asks for no token"] * (not asked) + ["the nodes have no token"] * (not there)


def run_directory_goes_with_a_machine(file: Shipped) -> list[str]:
    run_dir = file.sweep.run_dir or ""
    return [] if run_dir.startswith(BUCKETS) else [f"{run_dir} is on the disk of a node"]


def another_image(file: Shipped) -> list[str]:
    docker = file.value["docker"]
    found = [f"{docker[key]} is not the one image" for key in ("head_image", "worker_image") if key in docker]
    found += [f"{docker['image']} is not of this version"] * _wrong_image(docker["image"])
    found += ["Ray's default commands install another Ray"] * (file.value.get("setup_commands") != [])
    pins = re.findall(r"pip install --user ([\w-]+)==(\S+)", file.text)
    known = [(package, version) for package, version in pins if package == "boto3"]
    found += [f"{package} is {version}" for package, version in known if version != pinned(package)]
    return found + ["what is installed on the head is not pinned"] * (not pins)


def machines_that_always_cost(file: Shipped) -> list[str]:
    found = [f"{worker['min_workers']} workers stay" for worker in file.workers if worker["min_workers"]]
    return found + ["nodes are stopped, and their disks kept"] * (file.value["provider"]["cache_stopped_nodes"] is not False)


def no_spot_workers(file: Shipped) -> list[str]:
    configs = [worker["node_config"] for worker in file.workers]
    spot = [
        config.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
        or config.get("scheduling", {}).get("provisioningModel") == "SPOT"
        for config in configs
    ]
    return [] if all(spot) else ["workers cost the full price"]


def machines_without_room(file: Shipped) -> list[str]:
    types = file.value["available_node_types"]
    nodes = [types[file.value["head_node_type"]]["resources"]]
    for worker in file.workers:
        nodes += [worker["resources"]] * min(worker["max_workers"], file.value["max_workers"])
    return _room(file.sweep, nodes)


def workers_that_cannot_use_the_bucket(file: Shipped) -> list[str]:
    """Ray gives rights to the head alone."""
    configs = [worker["node_config"] for worker in file.workers]
    return [] if all("IamInstanceProfile" in c or "serviceAccounts" in c for c in configs) else ["workers have no rights"]


ANY = (not_told_to_grow, trials_end_with_their_node)
KUBERNETES = (
    *ANY,
    gpu_on_the_head,
    no_token_from_a_secret,
    run_directory_goes_with_a_node,
    another_ray_than_the_image,
    workers_that_always_cost,
    old_autoscaler,
    servers_without_room,
    little_shared_memory,
    steps_cut_off,
    root_in_a_pod,
    data_that_goes_with_the_cluster,
)
RAY_UP = (
    *ANY,
    gpu_on_the_head_node,
    no_token_on_the_nodes,
    run_directory_goes_with_a_machine,
    another_image,
    machines_that_always_cost,
    no_spot_workers,
    machines_without_room,
    workers_that_cannot_use_the_bucket,
)
Trap = Callable[[Shipped], list[str]]
TRAPS: dict[str, tuple[Trap, ...]] = {
    "kuberay/rayjob.yaml": (*KUBERNETES, a_lost_head_is_the_end, a_cluster_that_stays),
    "kuberay/raycluster.yaml": KUBERNETES,
    "ray-up/aws.yaml": RAY_UP,
    "ray-up/gcp.yaml": RAY_UP,
}

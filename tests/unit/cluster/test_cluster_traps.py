"""The files below `cluster/` avoid the traps that no schema sees, and each trap is seen in a broken copy of a file."""

import pytest
from support import cluster_traps as traps
from support.cluster_files import pinned, shipped


@pytest.mark.parametrize(("name", "trap"), [(name, trap) for name, of in traps.TRAPS.items() for trap in of])
def test_a_file_avoids_a_trap(name: str, trap: traps.Trap) -> None:
    assert trap(shipped(name)) == []


CPU_SERVERS = ("--set server.gpus=1", "--set server.gpus=0")
KUBERNETES_BROKEN = [
    (traps.not_told_to_grow, "--set autoscaling=true", ""),
    (traps.trials_end_with_their_node, "--set trial.max_failures=10", ""),
    (traps.gpu_on_the_head, 'num-gpus: "0"', 'num-gpus: "1"'),
    (traps.gpu_on_the_head, "memory: 16Gi", 'memory: 16Gi, nvidia.com/gpu: "1"'),
    (traps.no_token_from_a_secret, "mode: token", "mode: disabled"),
    (traps.no_token_from_a_secret, "secretName: bt-ray-token", ""),
    (traps.run_directory_goes_with_a_node, "persistentVolumeClaim: {claimName: bt-ray-shared}", "emptyDir: {}"),
    (traps.run_directory_goes_with_a_node, "--run-dir /shared/runs/today", "--run-dir /tmp/runs/today"),
    (traps.run_directory_goes_with_a_node, "mountPath: /shared", "mountPath: /elsewhere"),
    (traps.another_ray_than_the_image, f'rayVersion: "{pinned("ray")}"', 'rayVersion: "2.40.0"'),
    (traps.another_ray_than_the_image, "-cuda  # EDIT", "-cpu  # EDIT"),
    (traps.another_ray_than_the_image, "bt-ray:0.1.0-cuda", "ray:latest"),
    (traps.workers_that_always_cost, "minReplicas: 0", "minReplicas: 1"),
    (traps.workers_that_always_cost, " replicas: 0", " replicas: 2"),
    (traps.old_autoscaler, "enableInTreeAutoscaling: true", "enableInTreeAutoscaling: false"),
    (traps.old_autoscaler, "version: v2", "version: v1"),
    (traps.servers_without_room, *CPU_SERVERS),
    (traps.servers_without_room, "--set server.count=4", "--set server.count=5"),
    (traps.servers_without_room, "--set server.gpus=1", "--set server.gpus=2"),
    (traps.servers_without_room, "--set server.cpus=4", "--set server.cpus=16"),
    (traps.little_shared_memory, "medium: Memory, ", ""),
    (traps.little_shared_memory, "mountPath: /dev/shm", "mountPath: /shm"),
    (traps.steps_cut_off, "terminationGracePeriodSeconds: 600", "terminationGracePeriodSeconds: 30"),
    (traps.steps_cut_off, "remaining-seconds 600", "remaining-seconds 60"),
    (traps.steps_cut_off, "^ray::ModelServer", "^ray::Server"),
    (traps.root_in_a_pod, "runAsNonRoot: true, ", ""),
    (traps.data_that_goes_with_the_cluster, "apiVersion", "---\nkind: PersistentVolumeClaim\n---\napiVersion"),
]
JOB_BROKEN = [
    (traps.a_lost_head_is_the_end, "backoffLimit: 5", "backoffLimit: 0"),
    (traps.a_lost_head_is_the_end, "submissionMode: SidecarMode", ""),
    (traps.a_cluster_that_stays, "shutdownAfterJobFinishes: true", ""),
]
RAY_UP_BROKEN = [
    (traps.not_told_to_grow, "--set autoscaling=true", ""),
    (traps.trials_end_with_their_node, "--set trial.max_failures=10", ""),
    (traps.gpu_on_the_head_node, '"GPU": 0', '"GPU": 1'),
    (traps.no_token_on_the_nodes, "--env=RAY_AUTH_MODE=token, ", ""),
    (traps.no_token_on_the_nodes, "/home/ray/.ray/auth_token", "/elsewhere/.ray/auth_token"),
    (traps.another_image, "bt-ray:0.1.0-cuda", "ray:latest"),
    (traps.another_image, "setup_commands: []\nhead", "head"),
    (traps.another_image, "container_name: bt_ray", "container_name: bt_ray\n  head_image: ray:latest"),
    (traps.machines_that_always_cost, "min_workers: 0", "min_workers: 1"),
    (traps.machines_that_always_cost, "cache_stopped_nodes: false", "cache_stopped_nodes: true"),
    (traps.machines_without_room, *CPU_SERVERS),
    (traps.machines_without_room, "--set server.count=4", "--set server.count=8"),
    (traps.machines_without_room, "--set server.gpus=1", "--set server.gpus=2"),
]
AWS_BROKEN = [
    (traps.gpu_on_the_head_node, "m7i.xlarge", "g6.xlarge"),
    (traps.run_directory_goes_with_a_machine, "s3://my-bucket/runs/today", "/home/ray/runs/today"),
    (traps.another_image, "boto3==1", "boto3==0"),
    (traps.another_image, f"boto3=={pinned('boto3')}", "boto3"),
    (traps.no_spot_workers, "{MarketType: spot}", "{}"),
    (traps.workers_that_cannot_use_the_bucket, "IamInstanceProfile: {Name: bt-ray-worker}", ""),
]
GCP_BROKEN = [
    (traps.gpu_on_the_head_node, "n2-standard-4", "a2-highgpu-1g"),
    (traps.run_directory_goes_with_a_machine, "gs://my-bucket/runs/today", "/home/ray/runs/today"),
    (traps.no_spot_workers, "provisioningModel: SPOT, ", ""),
    (traps.workers_that_cannot_use_the_bucket, "serviceAccounts:", "tags:"),
]
BROKEN = {
    "kuberay/rayjob.yaml": KUBERNETES_BROKEN + JOB_BROKEN,
    "kuberay/raycluster.yaml": KUBERNETES_BROKEN,
    "ray-up/aws.yaml": RAY_UP_BROKEN + AWS_BROKEN,
    "ray-up/gcp.yaml": RAY_UP_BROKEN + GCP_BROKEN,
}


@pytest.mark.parametrize(
    ("name", "trap", "right", "wrong"), [(name, *mistake) for name, mistakes in BROKEN.items() for mistake in mistakes]
)
def test_a_trap_is_seen_in_a_broken_copy(name: str, trap: traps.Trap, right: str, wrong: str) -> None:
    assert trap(shipped(name).broken(right, wrong)) != []


def test_every_trap_is_shown_to_be_seen() -> None:
    assert {name: {trap for trap, *_ in of} for name, of in BROKEN.items()} == {n: set(of) for n, of in traps.TRAPS.items()}

"""Whether a cluster can ever hold a sweep, from the resources of its nodes."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bt_ray.errors import ResourcesError
from bt_ray.pool.resources import check_resources
from bt_ray.settings.config import SweepConfig, make_config

TWO_CORES = [{"CPU": 2.0}]
A100_AND_L4 = [
    {"CPU": 8.0, "GPU": 8.0, "accelerator_type:A100": 1.0},
    {"CPU": 8.0, "GPU": 1.0, "accelerator_type:L4": 1.0},
]


def config(autoscaling: bool = False, **server: Any) -> SweepConfig:
    values = {"task": "m:f", "model": "org/m", "strategies": ["p", "w"], "server": server, "autoscaling": autoscaling}
    return make_config(values)


@pytest.mark.parametrize(
    ("server", "nodes", "missing"),
    [
        ({"gpus": 2}, [{"CPU": 8.0, "GPU": 1.0}] * 4, "A server needs 2 GPUs on one node; the largest node has 1 GPU."),
        ({"cpus": 3}, TWO_CORES, "A server needs 3 CPUs on one node; the largest node has 2 CPUs."),
        ({"count": 3}, TWO_CORES, "asks for 3 servers of 1 CPU each; the cluster has room for 2. Set server.count to 2"),
        ({"count": 2}, TWO_CORES, "2 servers of 1 CPU each leave no 0.1 CPU for a trial: the cluster has 2 CPUs."),
        ({"count": 3, "gpus": 1}, [{"CPU": 8.0, "GPU": 2.0}], "3 servers of 1 GPU and 1 CPU each"),
        ({"count": 1, "gpus": 1}, [{"CPU": 1.0, "GPU": 1.0}], "leave no 0.1 CPU for a trial"),
        (
            {"gpus": 1, "accelerator_type": "H100"},
            A100_AND_L4,
            "No node has GPUs of the type H100; the cluster has A100, L4.",
        ),
        ({"gpus": 2, "accelerator_type": "L4"}, A100_AND_L4, "needs 2 GPUs on one node; the largest node has 1 GPU."),
        ({"count": 2, "gpus": 1, "accelerator_type": "L4"}, A100_AND_L4, "the cluster has room for 1"),
        ({}, [], "the largest node has 0 CPUs"),
    ],
)
def test_what_is_missing_is_named(server: dict[str, Any], nodes: list[dict[str, float]], missing: str) -> None:
    with pytest.raises(ResourcesError) as caught:
        check_resources(config(**server), nodes)
    assert missing in str(caught.value)
    (warning,) = check_resources(config(autoscaling=True, **server), nodes)
    assert missing in warning


def test_each_process_of_a_trial_needs_its_share() -> None:
    of_three = make_config({**config(cpus=0.9).model_dump(), "trial": {"processes": 3, "cpus": 0.1}})
    assert check_resources(of_three, [{"CPU": 1.0}, {"CPU": 0.2}]) == []
    with pytest.raises(ResourcesError, match=r"leave no 0\.1 CPU for each of a trial's 3 processes: .* or trial.processes"):
        check_resources(of_three, [{"CPU": 1.1}])


def test_models_with_slots_of_their_own_need_room_too() -> None:
    own = {"org/large": {"count": 1, "gpus": 8, "accelerator_type": "A100"}}
    small = {"count": 1, "gpus": 1, "accelerator_type": "L4", "models": own}
    assert check_resources(config(**small), A100_AND_L4, ["", "org--large"]) == []
    with pytest.raises(
        ResourcesError, match=r"asks for 1 server of 1 A100 GPU and 1 CPU each; the cluster has room for 0\. Make"
    ):
        check_resources(config(**{**small, "accelerator_type": "A100"}), A100_AND_L4[:1], ["", "org--large"])


def test_small_servers_are_not_counted_on_the_node_that_a_large_one_needs() -> None:
    nodes = [
        {"CPU": 64.0, "GPU": 8.0, "accelerator_type:H100": 1.0},
        {"CPU": 64.0, "GPU": 4.0, "accelerator_type:H100": 1.0},
    ]
    own = {"org/small": {"count": 4, "gpus": 1, "accelerator_type": "H100"}}
    assert check_resources(config(count=1, gpus=8, models=own), nodes, ["org--small", ""]) == []
    own["org/small"]["count"] = 5
    with pytest.raises(ResourcesError, match=r'room for 4\. Set server\.models\."org/small"\.count to 4, or make'):
        check_resources(config(count=1, gpus=8, models=own), nodes, ["org--small", ""])


def test_the_demos_slots_fit_on_two_cores() -> None:
    assert check_resources(config(count=2, cpus=0.9), TWO_CORES) == []


@given(
    st.lists(st.tuples(st.integers(1, 16), st.integers(0, 8)), min_size=1, max_size=5),
    st.integers(1, 8),
    st.integers(1, 4),
    st.integers(0, 4),
)
def test_what_passes_can_be_placed_and_leaves_room_for_a_trial(
    nodes: list[tuple[int, int]], count: int, cpus: int, gpus: int
) -> None:
    totals = [{"CPU": float(cpu), "GPU": float(gpu)} for cpu, gpu in nodes]
    try:
        check_resources(config(count=count, cpus=cpus, gpus=gpus), totals)
    except ResourcesError:
        return
    room = sum(min(cpu // cpus, gpu // gpus if gpus else cpu) for cpu, gpu in nodes)
    assert room >= count
    assert sum(cpu for cpu, _ in nodes) > count * cpus

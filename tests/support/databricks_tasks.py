"""A task that Databricks fine-tunes. The test has a copy of this file, with the workspace's port in `port` beside it.

`databricks_genai`, which orders fine-tunes, cannot be installed beside this project: it wants an older `datasets`. The
module that DSPy's provider takes from it stands here in its place; everything else is Databricks's own SDK.
"""

import os
import sys
import types
from pathlib import Path
from typing import Any

import dspy
import httpx
from api_server import KEY
from dspy.clients.databricks import DatabricksProvider
from dspy.teleprompt import BootstrapFinetune
from tasks import Demos, Double, double, exact

import bt_ray

HOST = f"http://127.0.0.1:{Path(__file__).with_name('port').read_text()}"
os.environ |= {"DATABRICKS_HOST": HOST, "DATABRICKS_TOKEN": KEY, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}


def create(**order: Any) -> str:
    answer = httpx.post(f"{HOST}/fine-tunes", json=order, headers={"Authorization": f"Bearer {KEY}"})
    return str(answer.raise_for_status().json()["name"])


def get(run: Any) -> Any:
    name = run if isinstance(run, str) else run.name
    status = httpx.get(f"{HOST}/fine-tunes/{name}").raise_for_status().json()["status"]
    return types.SimpleNamespace(name=name, status=types.SimpleNamespace(display_name=status))


foundation_model = types.ModuleType("databricks.model_training.foundation_model")
foundation_model.__dict__.update(create=create, get=get)
model_training = types.ModuleType("databricks.model_training")
model_training.__dict__.update(foundation_model=foundation_model)
sys.modules |= {module.__name__: module for module in (model_training, foundation_model)}


def fine_tuned_by_databricks() -> bt_ray.Task:
    def optimizers(ctx: bt_ray.StepContext) -> dict[str, Any]:
        where = {"train_data_path": "/Volumes/main/default/data/sweep", "register_to": "main.default.skill-7"}
        return {"p": Demos(), "w": BootstrapFinetune(metric=exact, train_kwargs={**where, "training_duration": "2ep"})}

    program = dspy.Predict(Double)
    lm = dspy.LM(
        "databricks/skill-4",
        provider=DatabricksProvider,  # the class: DSPy takes an object of it for one that does not fine-tune
        finetuning_model="meta/skill-4",
        api_base=f"{HOST}/serving-endpoints",
        api_key=KEY,
        num_retries=0,
        temperature=0,
    )
    program.set_lm(lm)
    return double(program=program, optimizers=optimizers, optimizer_compile_args={})

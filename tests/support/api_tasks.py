"""Tasks whose LMs are an API's. Each test has a copy of this file, with the API's port in the file `port` beside it."""

import os
from pathlib import Path
from typing import Any

import dspy
from api_server import KEY
from dspy.clients.openai import OpenAIProvider
from dspy.clients.provider import Provider
from dspy.teleprompt import BootstrapFinetune
from tasks import Demos, Double, double, exact

import bt_ray

URL = f"http://127.0.0.1:{Path(__file__).with_name('port').read_text()}/v1"


def api(model: str = "openai/skill-4", **settings: Any) -> dspy.LM:
    """An LM of the test's own API. DSPy's cache does not look at the address, and would answer for another test's."""
    return dspy.LM(model, api_base=URL, api_key=KEY, temperature=0, num_retries=0, cache=False, **settings)


def doubling(lm: dspy.LM) -> dspy.Module:
    program = dspy.Predict(Double)
    program.set_lm(lm)
    return program


def prompts_alone() -> bt_ray.Task:
    return double(program=doubling(api()), optimizers=lambda ctx: {"p": Demos()}, optimizer_compile_args={})


def taught() -> bt_ray.Task:
    """The sweep's model, taught by the API's."""
    return double(teacher=doubling(api()), optimizer_compile_args={})


class Mixed(dspy.Module):
    """A predictor on the API, one on the sweep's model."""

    def __init__(self) -> None:
        super().__init__()
        self.first = doubling(api())
        self.second = dspy.Predict(Double)

    def forward(self, question: str) -> dspy.Prediction:
        self.first(question=question)
        return self.second(question=question)


def mixed() -> bt_ray.Task:
    """The API's predictor is left as it is: only the sweep's model is trained."""

    class SecondAlone(BootstrapFinetune):  # type: ignore[misc]
        def compile(self, student: Any, trainset: Any, teacher: Any = None) -> Any:
            student.second = super().compile(student.second, trainset, student.second.deepcopy())
            return student

    return double(program=Mixed(), optimizers=lambda ctx: {"w": SecondAlone(metric=exact)}, optimizer_compile_args={})


def fine_tuned_by_openai() -> bt_ray.Task:
    os.environ |= {"OPENAI_BASE_URL": URL, "OPENAI_API_KEY": KEY}  # where DSPy's provider looks
    OpenAIProvider.wait_for_job.__defaults__ = (0.2,)  # it asks every 20 s
    return double(
        program=doubling(api()),
        optimizers=lambda ctx: {"p": Demos(), "w": BootstrapFinetune(metric=exact, train_kwargs={"n_epochs": 2})},
        optimizer_compile_args={},
    )


class Trainer(Provider):  # type: ignore[misc]
    """A provider of the user's own. It notes what DSPy asks of it."""

    def __init__(self) -> None:
        super().__init__()
        self.finetunable = True

    @staticmethod
    def note(what: str) -> None:
        with Path(__file__).with_name("provider.txt").open("a") as log:
            log.write(f"{what}\n")

    def launch(self, lm: dspy.LM, launch_kwargs: Any = None) -> None:
        self.note(f"launch {lm.model}")

    def kill(self, lm: dspy.LM, launch_kwargs: Any = None) -> None:
        self.note(f"kill {lm.model}")

    def finetune(self, job: Any, model: str, train_data: Any, train_data_format: Any, train_kwargs: Any = None) -> str:
        self.note(f"finetune {model} on {len(train_data)}")
        return "openai/skill-9"


def fine_tuned_by_the_users_own() -> bt_ray.Task:
    return double(
        program=doubling(api(provider=Trainer())),
        optimizers=lambda ctx: {"p": Demos(), "w": BootstrapFinetune(metric=exact)},
        optimizer_compile_args={},
    )

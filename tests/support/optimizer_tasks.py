"""Tasks with DSPy's own optimizers, set so small that their outcome is known. See `scripted_answers` for what models say.

A test whose task asks an API has a copy of this file (see `running_api`).
"""

import asyncio
import re
from pathlib import Path
from typing import Any

import dspy
import numpy as np
from api_server import KEY
from dspy.teleprompt import (
    COPRO,
    GEPA,
    SIMBA,
    BetterTogether,
    BootstrapFewShot,
    BootstrapFewShotWithOptuna,
    BootstrapFewShotWithRandomSearch,
    BootstrapFinetune,
    Ensemble,
    InferRules,
    KNNFewShot,
    LabeledFewShot,
    MIPROv2,
)
from dspy.teleprompt.teleprompt import Teleprompter
from tasks import Double, double, exact, examples, explained

import bt_ray

FEW_TRIALS = {"num_trials": 6, "minibatch": False}
ONE_PROPOSAL = 60
"""Calls of GEPA's metric: the valset of 20, a minibatch of 10 before and after a proposal, and the valset again."""


def mipro(**models: Any) -> MIPROv2:
    """Tries one proposed instruction, and no demos."""
    return MIPROv2(exact, auto=None, num_candidates=2, max_bootstrapped_demos=0, max_labeled_demos=0, **models)


def gepa(metric: Any, reflection_lm: dspy.LM, **settings: Any) -> GEPA:
    return GEPA(metric, reflection_lm=reflection_lm, max_metric_calls=ONE_PROPOSAL, reflection_minibatch_size=10, **settings)


def simba(**settings: Any) -> SIMBA:
    return SIMBA(metric=exact, bsize=20, num_candidates=2, max_steps=1, **settings)


def pooled(ctx: bt_ray.StepContext) -> dict[str, Teleprompter]:
    """Every optimizer, with the student's LM for whatever it asks."""
    return {
        "fewshot": BootstrapFewShot(exact, max_bootstrapped_demos=2, max_labeled_demos=3),
        "search": BootstrapFewShotWithRandomSearch(
            exact, max_bootstrapped_demos=3, max_labeled_demos=1, num_candidate_programs=1
        ),
        "mipro": mipro(),
        "gepa": gepa(exact, ctx.lm, log_dir=str(ctx.scratch_dir)),
        "simba": simba(),
        "copro": COPRO(metric=exact, breadth=2, depth=2),
        "w": BootstrapFinetune(exact),
    }


def all_optimizers() -> bt_ray.Task:
    teacher = bt_ray.gold_label_teacher(dspy.Predict(Double), examples(range(100, 120)))
    return double(
        optimizers=pooled,
        optimizer_compile_args={"mipro": FEW_TRIALS, "w": {"teacher": teacher}},
        testset=None,
    )


def embed(texts: list[str]) -> Any:
    """Numbers that are near each other are alike."""
    return np.array([[1.0, float(re.findall(r"number (\d+)", text)[-1])] for text in texts])


def other_optimizers() -> bt_ray.Task:
    """The rest of DSPy's public optimizers. `knn` and `ensemble` make programs of another kind."""
    settings = {"max_bootstrapped_demos": 2, "max_labeled_demos": 3}

    def optimizers(ctx: bt_ray.StepContext) -> dict[str, Teleprompter]:
        return {
            "labeled": LabeledFewShot(k=2),
            "optuna": BootstrapFewShotWithOptuna(exact, num_candidate_programs=2, max_labeled_demos=2),
            "rules": InferRules(num_candidates=1, num_rules=2, metric=exact, **settings),
            "together": BetterTogether(metric=exact, p=LabeledFewShot(k=2), q=COPRO(metric=exact, breadth=2, depth=2)),
            "knn": KNNFewShot(3, examples(range(100, 120)), dspy.Embedder(embed), metric=exact, **settings),
            "ensemble": Ensemble(reduce_fn=dspy.majority),
        }

    arguments = {"optuna": {"max_demos": 2}, "together": {"strategy": "p -> q"}}
    return double(optimizers=optimizers, optimizer_compile_args=arguments, testset=None)


def avatar() -> bt_ray.Task:
    return double(optimizers=lambda ctx: {"avatar": dspy.AvatarOptimizer(metric=exact)})


def default_optimizers() -> bt_ray.Task:
    return double(optimizers=None, optimizer_compile_args={}, testset=None)


def awaited() -> bt_ray.Task:
    """A coroutine function as the metric, with feedback."""

    async def metric(example: Any, prediction: Any, trace: Any = None, *of_gepa: Any) -> dspy.Prediction:
        await asyncio.sleep(0)
        return explained(example, prediction)

    def optimizers(ctx: bt_ray.StepContext) -> dict[str, Teleprompter]:
        return {
            "fewshot": BootstrapFewShot(metric, max_bootstrapped_demos=2, max_labeled_demos=3),
            "gepa": gepa(metric, ctx.lm, log_dir=str(ctx.scratch_dir)),
        }

    return double(metric=metric, optimizers=optimizers, optimizer_compile_args={})


def with_compile_args() -> bt_ray.Task:
    """Each optimizer has examples of its own: 2xx to train on, 3xx to choose by; `fewshot` and `w` have another teacher."""
    program, trainset = dspy.Predict(Double), examples(range(200, 210))
    teacher = bt_ray.gold_label_teacher(program, trainset)
    return double(
        optimizers=pooled,
        teacher=bt_ray.gold_label_teacher(program, examples(range(100, 120))),
        optimizer_compile_args={
            "fewshot": {"trainset": trainset, "teacher": teacher},
            "search": {"valset": examples(range(300, 310))},
            "mipro": {**FEW_TRIALS, "trainset": trainset, "valset": examples(range(300, 310)), "teacher": None},
            "w": {"trainset": trainset, "teacher": [teacher]},
        },
        testset=None,
    )


def by_an_api() -> bt_ray.Task:
    """An API's model proposes for `mipro` and `gepa`, bootstraps for `bootstrapped`, and shows `simba` what is right."""

    def optimizers(ctx: bt_ray.StepContext) -> dict[str, Teleprompter]:
        url = f"http://127.0.0.1:{Path(__file__).with_name('port').read_text()}/v1"
        api = dspy.LM("openai/skill-10", api_base=url, api_key=KEY, cache=False, num_retries=0)
        return {
            "mipro": mipro(prompt_model=api),
            "gepa": gepa(explained, api),
            "bootstrapped": MIPROv2(
                exact, auto=None, num_candidates=3, max_bootstrapped_demos=1, max_labeled_demos=1, task_model=api
            ),
            "simba": simba(max_demos=0, teacher_settings={"lm": api}),
        }

    return double(
        metric=explained,
        optimizers=optimizers,
        optimizer_compile_args={"mipro": FEW_TRIALS, "bootstrapped": {"num_trials": 12, "minibatch": False}},
        testset=None,
    )

"""The task of `said`, for optimizers of prompts: an API's model proposes for `mipro`, the served one for `gepa`.

A test has a copy of this file (see `running_api`).
"""

from pathlib import Path

import dspy
from api_server import KEY
from dspy.teleprompt import GEPA, MIPROv2
from dspy.teleprompt.teleprompt import Teleprompter
from said import build, same

import bt_ray


def explained(example: dspy.Example, prediction: dspy.Prediction, trace: object = None, *of_gepa: object) -> dspy.Prediction:
    return dspy.Prediction(score=float(same(example, prediction)), feedback=f"Say {example.a}.")


def prompted() -> bt_ray.Task:
    said = build()

    def optimizers(ctx: bt_ray.StepContext) -> dict[str, Teleprompter]:
        url = f"http://127.0.0.1:{Path(__file__).with_name('port').read_text()}/v1"
        api = dspy.LM("openai/skill-10", api_base=url, api_key=KEY, cache=False)
        return {
            "mipro": MIPROv2(
                same, auto=None, num_candidates=2, max_bootstrapped_demos=0, max_labeled_demos=0, prompt_model=api
            ),
            "gepa": GEPA(
                explained,
                reflection_lm=ctx.lm.copy(temperature=1.0, max_tokens=512),
                max_metric_calls=12,
                add_format_failure_as_feedback=True,
            ),
        }

    return bt_ray.Task(
        program=said.program,
        trainset=said.trainset[:6],
        valset=said.valset[:4] if said.valset else None,
        metric=explained,
        optimizers=optimizers,
        optimizer_compile_args={"mipro": {"num_trials": 2, "minibatch": False}},
    )

"""Where bt_ray differs from DSPy 3.4.1 on purpose: DSPy's behaviour first, then bt_ray's. `docs/differences.md` links here.

When a test of DSPy's behaviour fails with a newer DSPy, the difference may have become unnecessary.
"""

import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import MethodType
from typing import Any

import dspy
import pytest
from dspy.teleprompt import GEPA, SIMBA, BootstrapFewShot, BootstrapFewShotWithRandomSearch, BootstrapFinetune, Teleprompter
from dspy.utils.exceptions import LMServerError
from support import tasks
from support.failing_server import failing_server
from support.slot_models import SlotModels
from support.sole_claims import SoleWalk, sole_walk

import bt_ray
from bt_ray.errors import InfrastructureFailure, TaskError
from bt_ray.settings.config import make_config
from bt_ray.trial.better_together import drop_traced_forward
from bt_ray.trial.failure_latch import FailureLatch
from bt_ray.trial.lm import ServedEngine, ServedLM, assign_lm, make_served_lm


def walk(task: bt_ray.Task, lm: ServedLM, strategy: str, **arguments: Any) -> SoleWalk:
    return sole_walk(task, lm, strategy, num_threads=2, **arguments)


def random_search() -> BootstrapFewShotWithRandomSearch:
    return BootstrapFewShotWithRandomSearch(
        metric=tasks.exact, max_bootstrapped_demos=1, max_labeled_demos=2, num_candidate_programs=1, num_threads=2
    )


def test_optimizers_ask_the_students_lm(lm: ServedLM, request_log: Callable[[], list[dict[str, Any]]]) -> None:
    # DSPy: copies that an optimizer makes lose their LM, so in "w -> p" the base model answers all requests of p.
    task = tasks.double()
    assign_lm(task.program, lm)
    optimizer = dspy.BetterTogether(metric=tasks.exact, p=random_search(), w=BootstrapFinetune(metric=tasks.exact))
    arguments = {"w": dict(task.optimizer_compile_args["w"])}
    with dspy.context(lm=lm):
        optimizer.compile(
            task.program, trainset=list(task.trainset), valset=list(task.valset or ()), seed=0, strategy="w -> p",
            num_threads=2, optimizer_compile_args=arguments,
        )  # fmt: skip
    base = lm.weights_id
    asked = request_log()
    after_w = asked[next(i for i, request in enumerate(asked) if request["weights"] != base) :]
    assert any(request["weights"] == base for request in after_w)

    # bt_ray: the weights of w answer them.
    before = len(request_log())
    both = tasks.double(optimizers=lambda ctx: {"p": random_search(), "w": BootstrapFinetune(metric=tasks.exact)})
    walk(both, lm, "w -> p")
    asked = request_log()[before:]
    after_w = asked[next(i for i, request in enumerate(asked) if request["weights"] != base) :]
    assert len(after_w) > 60, "the optimizer's requests are among them"
    assert not any(request["weights"] == base for request in after_w)


def test_a_teacher_reaches_each_optimizer_in_the_form_that_it_takes(lm: ServedLM) -> None:
    # DSPy: a teacher given to BetterTogether arrives as a list, which BootstrapFewShot cannot copy: the step fails.
    task = tasks.double()
    assign_lm(task.program, lm)
    teacher = bt_ray.gold_label_teacher(task.program, task.trainset)
    optimizer = dspy.BetterTogether(metric=tasks.exact, p=BootstrapFewShot(metric=tasks.exact))
    program = optimizer.compile(
        task.program, trainset=list(task.trainset), valset=list(task.valset or ()), teacher=teacher, strategy="p", seed=0
    )
    assert program.flag_compilation_error_occurred

    # bt_ray: BootstrapFewShot gets the teacher itself, BootstrapFinetune a list.
    routed = tasks.double(
        teacher=teacher,
        optimizer_compile_args={},
        optimizers=lambda ctx: {"p": BootstrapFewShot(metric=tasks.exact), "w": BootstrapFinetune(metric=tasks.exact)},
    )
    walked = walk(routed, lm, "p -> w")
    assert walked.failure is None
    assert not walked.program.flag_compilation_error_occurred
    bootstrapped = next(c for c in walked.program.candidate_programs if c["strategy"] == "p")["program"].demos
    assert sum(bool(demo.get("augmented")) for demo in bootstrapped) == 4


def test_an_evaluation_that_fails_as_a_whole_is_an_error(lm: ServedLM) -> None:
    def broken(example: Any, prediction: Any, trace: Any = None) -> bool:
        raise KeyError("no such field")

    # DSPy: a metric that always raises gives a baseline of 0.
    task = tasks.double(metric=broken, optimizers=lambda ctx: {"p": tasks.Demos()}, optimizer_compile_args={})
    assign_lm(task.program, lm)
    optimizer = dspy.BetterTogether(metric=broken, p=tasks.Demos())
    examples = list(task.valset or ())
    program = optimizer.compile(task.program, trainset=list(task.trainset), valset=examples, strategy="p", seed=0)
    assert {candidate["score"] for candidate in program.candidate_programs} == {0.0}

    # bt_ray: it raises.
    with pytest.raises(Exception, match="Execution cancelled due to errors"):
        walk(task, lm, "p")


def test_a_lost_server_is_no_score(settings: dict[str, Any], tmp_path: Path) -> None:
    gone = {**settings, "server": {**settings["server"], "env": {"SCRIPTED_START": "die"}}}
    models = SlotModels(make_config(gone), tmp_path)

    # DSPy: each example whose request failed scores 0, and so does the program.
    nobody = dspy.LM("openai/x", api_base="http://127.0.0.1:9/v1", api_key="none", num_retries=0, engine="lm15", cache=False)
    task = tasks.double(optimizers=lambda ctx: {"p": tasks.Demos()}, optimizer_compile_args={})
    assign_lm(task.program, nobody)
    examples = list(task.valset or ())
    optimizer = dspy.BetterTogether(metric=tasks.exact, p=tasks.Demos())
    program = optimizer.compile(
        task.program, trainset=list(task.trainset), valset=examples, strategy="p", seed=0, max_errors=1000
    )
    assert {candidate["score"] for candidate in program.candidate_programs} == {0.0}

    # bt_ray: the failure goes through DSPy, and ends the trial.
    engine = ServedEngine(models, FailureLatch(), retries=1, timeout_s=5, max_connections=10)
    served = make_served_lm(models.base, engine, make_config(gone).lm)
    task = tasks.double(optimizers=lambda ctx: {"p": tasks.Demos()}, optimizer_compile_args={})
    with pytest.raises(InfrastructureFailure, match="the engine found no memory"):
        walk(task, served, "p", max_errors=1000)

    # The same where the program asks an API that does not answer.
    task = tasks.double(optimizers=lambda ctx: {"p": tasks.Demos()}, optimizer_compile_args={})
    assign_lm(task.program, nobody)
    engine = ServedEngine(models, FailureLatch(), retries=1, timeout_s=5, max_connections=10)
    with pytest.raises(InfrastructureFailure, match="refused"):
        walk(task, make_served_lm(models.base, engine, make_config(gone).lm), "p", max_errors=1000)


@pytest.mark.parametrize("optimizer", ["gepa", "simba"])
def test_an_answer_that_an_optimizer_lost_is_no_outcome(lm: ServedLM, optimizer: str) -> None:
    def asking(api: dspy.LM) -> dict[str, Any]:
        if optimizer == "gepa":
            return {"p": GEPA(tasks.exact, reflection_lm=api, max_metric_calls=40)}
        return {"p": SIMBA(metric=tasks.exact, bsize=20, num_candidates=2, max_steps=1, teacher_settings={"lm": api})}

    with failing_server("503") as url:
        api = dspy.LM("openai/large", api_base=f"{url}/v1", api_key="none", num_retries=0, cache=False)

        # DSPy: GEPA gives up a proposal that it got no answer for, SIMBA takes the missing answer for a bad one.
        task = tasks.double()
        assign_lm(task.program, lm)
        with dspy.context(lm=lm):
            program = dspy.BetterTogether(metric=tasks.exact, **asking(api)).compile(
                task.program, trainset=list(task.trainset), valset=list(task.valset or ()), strategy="p", seed=0
            )
        assert len(program.candidate_programs) == 2
        assert not program.flag_compilation_error_occurred

        # bt_ray: the infrastructure is lost.
        task = tasks.double(optimizers=lambda ctx: asking(api), optimizer_compile_args={})
        with pytest.raises(InfrastructureFailure, match="openai/large"):
            walk(task, lm, "p")


class Swallowing(Teleprompter):  # type: ignore[misc]
    """Goes on without the answer that it asked an API for."""

    def __init__(self, api: dspy.LM, asked: list[str]) -> None:
        self.api, self.asked = api, asked

    def compile(self, student: dspy.Module, **arguments: Any) -> dspy.Module:
        self.asked.append("")
        with suppress(LMServerError):
            self.api("a better instruction")
        return student.deepcopy()


def test_an_outcome_without_an_answer_is_computed_again_and_never_kept(lm: ServedLM) -> None:
    lm.cache = True  # the step's evaluation asks nothing, as the baseline's had the same prompts
    asked: list[str] = []
    with failing_server("503") as url:
        api = dspy.LM("openai/large", api_base=f"{url}/v1", api_key="none", num_retries=0, cache=False)
        task = tasks.double(optimizers=lambda ctx: {"p": Swallowing(api, asked)}, optimizer_compile_args={})
        with pytest.raises(InfrastructureFailure, match="openai/large"):
            walk(task, lm, "p", retries=1)
    assert len(asked) == 2


class Wrapped(dspy.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        self.predict = dspy.Predict(tasks.Double)

    def forward(self, question: str) -> Any:
        return self.predict(question=question)


def test_copies_of_a_fine_tuned_program_run_their_own_predictors(lm: ServedLM) -> None:
    # DSPy: after w, the program keeps a `forward` of its own, bound to the original.
    program = Wrapped()
    program.set_lm(lm)
    trainset = tasks.examples(range(100, 104))
    compiled = BootstrapFinetune(metric=None, num_threads=2).compile(program, trainset=trainset)
    assert isinstance(compiled.__dict__["forward"], MethodType)

    # bt_ray: it is dropped.
    drop_traced_forward(compiled)
    assert "forward" not in compiled.__dict__
    task = tasks.double(program=Wrapped(), optimizer_compile_args={}, metric=tasks.exact, teacher=None)
    task = tasks.double(
        program=task.program,
        optimizer_compile_args={"w": {"teacher": bt_ray.gold_label_teacher(task.program, task.trainset)}},
    )
    walked = walk(task, lm, "w")
    assert all("forward" not in c["program"].__dict__ for c in walked.program.candidate_programs)


def test_a_score_that_is_no_number_is_an_error_of_its_example(lm: ServedLM) -> None:
    def metric(example: dspy.Example, prediction: Any, trace: Any = None) -> float:
        return math.nan if example.question in ("number 0", "number 100") else float(tasks.exact(example, prediction))

    # DSPy: one NaN is the score of all examples together, and BootstrapFewShot keeps the example that has it.
    program = dspy.Predict(tasks.Double)
    program.set_lm(lm)
    assert math.isnan(dspy.Evaluate(devset=tasks.examples(range(10)), metric=metric, num_threads=2)(program).score)
    trainset = tasks.examples(range(100, 104))
    with dspy.context(lm=lm):
        kept = BootstrapFewShot(metric=metric, max_labeled_demos=0).compile(program, trainset=trainset)
    assert [demo.question for demo in kept.demos] == ["number 100", "number 101"]

    # bt_ray: that example scores 0, counts as failed, and is not kept.
    task = tasks.double(
        metric=metric,
        trainset=trainset,
        optimizers=lambda ctx: {"p": BootstrapFewShot(metric=metric, max_labeled_demos=0)},
        optimizer_compile_args={},
    )
    walked = walk(task, lm, "p")
    assert [outcome.score for outcome in walked.outcomes] == [15.0, 25.0], "1, 10, 11; a demo adds 2 and 12"
    assert walked.outcomes[0].example_errors == {"ValueError: the metric gave nan, which is no score": 1}
    assert [demo["question"] for demo in walked.program.demos] == ["number 101"]


class Handed(dspy.Provider):  # type: ignore[misc]
    """Keeps the data that it was handed to train on."""

    def __init__(self) -> None:
        super().__init__()
        self.finetunable = True
        self.data: list[Any] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "Handed":
        return self

    def finetune(self, job: Any, model: str, train_data: Any, train_data_format: Any, train_kwargs: Any = None) -> str:
        self.data.append(train_data)
        return model


def test_a_metric_with_feedback_filters_by_its_score(lm: ServedLM) -> None:
    explained = tasks.explained

    # DSPy: a prediction with a score of 0 is true as well, so wrong answers are trained on.
    plain = dspy.Predict(tasks.Double)
    plain.set_lm(lm.copy(provider=(handed := Handed())))
    BootstrapFinetune(metric=explained, num_threads=2).compile(plain, trainset=tasks.examples(range(100, 120)))
    assert [len(data) for data in handed.data] == [20]

    # bt_ray: the score decides.
    task = tasks.double(
        metric=explained, optimizers=lambda ctx: {"w": BootstrapFinetune(metric=explained)}, optimizer_compile_args={}
    )
    walked = walk(task, lm, "w")
    assert walked.failure is None
    (data,) = lm.engine.models.work_dir.glob("trainings/*/*/data.jsonl")
    assert len(data.read_text().splitlines()) == 4


def test_training_on_nothing_is_refused(lm: ServedLM) -> None:
    def nothing(example: Any, prediction: Any, trace: Any = None) -> bool:
        return False

    # DSPy: an empty training set is handed to the provider.
    plain = dspy.Predict(tasks.Double)
    plain.set_lm(lm.copy(provider=(handed := Handed())))
    BootstrapFinetune(metric=nothing, num_threads=2).compile(plain, trainset=tasks.examples(range(100, 104)))
    assert handed.data == [[]]

    # bt_ray: the strategy ends there, and says why.
    task = tasks.double(metric=nothing, optimizers=lambda ctx: {"w": BootstrapFinetune(metric=nothing)})
    walked = walk(task, lm, "w")
    assert walked.failure is not None
    assert "filter left none of the 20 bootstrapped traces" in walked.failure.message


class Pair(dspy.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        self.first = dspy.Predict(tasks.Double)
        self.second = dspy.Predict(tasks.Double)

    def forward(self, question: str) -> Any:
        self.first(question=question)
        return self.second(question=question)


def test_a_prompt_optimizer_is_refused_where_predictors_have_different_lms(lm: ServedLM) -> None:
    other = dspy.LM("openai/another-model", api_key="none")

    # DSPy: the copies have no LM, so one LM answers for all predictors.
    program = Pair()
    program.first.lm, program.second.lm = lm, other
    assert {predictor.lm for predictor in program.reset_copy().predictors()} == {None}

    # bt_ray: the step is refused.
    pair = Pair()
    pair.second.lm = other
    task = tasks.double(program=pair, valset=None, optimizer_compile_args={}, optimizers=lambda ctx: {"p": random_search()})
    walked = walk(task, lm, "p", valset_ratio=0)
    assert walked.failure is not None
    assert walked.failure.message.startswith(TaskError.__name__)
    assert "predictors use different LMs" in walked.failure.message

"""Sweeps with DSPy's own optimizers on scripted models, for which each optimizer's outcome is known in advance.

Trials run one after the other here, on one server, so the requests between a step's start and its end are the step's.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dspy
import pytest
from conftest import SUPPORT, logged_requests, scripted_sweep
from support.running_api import Api, running_api
from support.scripted_answers import instruction
from support.tasks import double, exact

import bt_ray
from bt_ray.driver.check import check_sweep
from bt_ray.run_dir.results import Candidate
from bt_ray.run_dir.storage import open_storage
from bt_ray.settings.config import make_config
from bt_ray.slot.base_models import base_weights
from bt_ray.winner.load import keep_best

pytestmark = pytest.mark.usefixtures("local_ray")

THREADS = 4
AFTER_W = ["fewshot", "search", "mipro", "gepa", "simba", "copro", "w"]


OPTIMIZERS = f"{SUPPORT / 'optimizer_tasks.py'}"


@dataclass(frozen=True)
class Step:
    """A step of a sweep: what it gave, the state of its program's predictor, and the requests that were answered for it."""

    candidate: Candidate
    state: dict[str, Any]
    requests: list[dict[str, Any]]

    @property
    def outcome(self) -> tuple[float | None, str, int, int]:
        """The score, the instruction, the demos, and how many of these are bootstrapped."""
        demos = self.state["demos"]
        bootstrapped = sum(bool(demo.get("augmented")) for demo in demos)
        return self.candidate.score, self.state["signature"]["instructions"], len(demos), bootstrapped

    @property
    def weights(self) -> str:
        return self.candidate.weights["self"]

    @property
    def proposals(self) -> int:
        """How many requests wanted an optimizer's proposal."""
        return sum(request["question"] is None for request in self.requests)

    @property
    def numbers(self) -> set[int]:
        """The numbers that the program was asked for."""
        return {int(request["question"]) for request in self.requests if request["question"] is not None}

    @property
    def demo_numbers(self) -> list[int]:
        return [int(demo["question"].removeprefix("number ")) for demo in self.state["demos"]]


class Swept:
    """A finished sweep in `folder`, of whose strategies some are refused."""

    def __init__(self, folder: Path, task: str, strategies: list[str], refused: Sequence[str] = ()) -> None:
        settings = scripted_sweep(folder)
        server = {**settings["server"], "count": 1}
        server["env"] = {**server["env"], "SCRIPTED_DELAY_S": "0.01"}  # so that requests in flight at once are seen
        values = {**settings, "strategies": strategies, "server": server, "num_threads": THREADS}
        self.run_dir = Path(settings["run_dir"])
        self.config = make_config({**values, "task": task})
        self.result = bt_ray.sweep(task, {**values, "trial": {"max_concurrent": 1}})
        self._requests = logged_requests(folder)
        self.errors = {trial.strategy: trial.error or "" for trial in self.result.trials if trial.strategy in refused}
        assert [trial.traceback for trial in self.result.trials if trial.strategy not in refused] == [None] * (
            len(strategies) - len(refused)
        )

    def __getitem__(self, prefix: str) -> Step:
        """The step of this prefix, whichever strategies share it."""
        candidate = next(candidate for candidate in self.result.candidates if candidate.prefix == prefix)
        requests = [request for request in self._requests if during(candidate, request["time"])]
        return Step(candidate, json.loads((self.run_dir / candidate.program).read_text()), requests)

    @contextmanager
    def loaded(self, candidate: Candidate) -> Iterator[Any]:
        """A candidate's program, as `bt_ray.load` gives that of the best."""
        storage, best = open_storage(str(self.run_dir)), self.result.best
        assert best is not None
        base = base_weights(str(self.config.model), self.config.server.engine_options)
        for kept in (candidate, best):
            keep_best(kept, storage, {base.id: base}, self.config, self.config.task)
            if kept is candidate:
                program = bt_ray.load(self.run_dir)
        yield program
        program.predictors()[0].lm.kill()

    @property
    def all_requests_are_candidates(self) -> bool:
        """Whether each request was answered for a candidate."""
        return all(any(during(candidate, r["time"]) for candidate in self.result.candidates) for r in self._requests)

    @property
    def most_in_flight(self) -> int:
        return max(request["in_flight"] for request in self._requests)

    @property
    def trained_on(self) -> list[list[str]]:
        """The prompts of each fine-tune's conversations, system message and all."""
        files = sorted(self.run_dir.glob("trainings/*/*/data.jsonl"))
        return [[prompt(json.loads(line)["messages"]) for line in file.read_text().splitlines()] for file in files]


def during(candidate: Candidate, time: float) -> bool:
    return candidate.started <= time <= candidate.started + candidate.seconds


def prompt(messages: list[dict[str, str]]) -> str:
    return "\n".join(message["content"] for message in messages if message["role"] != "assistant")


@pytest.fixture(scope="module")
def pooled(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """Every optimizer after `w`, with proposals by the pool as well, and several optimizers in one strategy."""
    strategies = [*(f"w -> {key}" for key in AFTER_W), "mipro -> gepa -> mipro", "gepa -> gepa", "mipro -> w"]
    return Swept(tmp_path_factory.mktemp("pooled"), f"{OPTIMIZERS}:all_optimizers", strategies)


# The base model answers 2 of 10 right; a fine-tune adds 3, a hint in the instruction 2, and each of at most 3 demos 1.
@pytest.mark.parametrize(
    ("optimizer", "score", "hints", "demos", "bootstrapped"),
    [
        ("fewshot", 80.0, 0, 3, 2),
        ("search", 80.0, 0, 3, 3),
        ("mipro", 70.0, 1, 0, 0),
        ("gepa", 70.0, 1, 0, 0),
        ("simba", 60.0, 0, 1, 1),
        ("copro", 90.0, 2, 0, 0),
        ("w", 80.0, 0, 0, 0),
    ],
)
def test_each_optimizer_changes_the_fine_tuned_program_as_it_should(
    pooled: Swept, optimizer: str, score: float, hints: int, demos: int, bootstrapped: int
) -> None:
    assert pooled["w"].outcome == (50.0, instruction(0), 0, 0)
    assert pooled[f"w -> {optimizer}"].outcome == (score, instruction(hints), demos, bootstrapped)


@pytest.mark.parametrize("optimizer", [key for key in AFTER_W if key != "w"])
def test_all_that_a_prompt_optimizer_asks_after_w_is_answered_by_the_weights_of_w(pooled: Swept, optimizer: str) -> None:
    step = pooled[f"w -> {optimizer}"]
    assert step.weights == pooled["w"].weights != pooled[""].weights
    assert {request["weights"] for request in step.requests} == {step.weights}
    assert (step.proposals > 0) == (optimizer in ("mipro", "gepa", "copro"))
    assert any(request["hints"] or request["demos"] for request in step.requests), "it was asked what the optimizer made"


def test_a_coroutine_function_as_the_metric_is_awaited_by_evaluations_and_optimizers(
    local_ray: None, tmp_path: Path
) -> None:
    swept = Swept(tmp_path, f"{OPTIMIZERS}:awaited", ["fewshot -> gepa"])
    assert swept["fewshot"].outcome == (50.0, instruction(0), 3, 2)
    assert swept["fewshot -> gepa"].outcome == (70.0, instruction(1), 3, 2)
    assert swept.result.test_score == 70.0


def test_a_fine_tune_of_a_fine_tune_has_weights_of_its_own(pooled: Swept) -> None:
    step = pooled["w -> w"]
    assert len({pooled[""].weights, pooled["w"].weights, step.weights}) == 3
    assert {request["weights"] for request in step.requests} == {step.weights}, "the teacher asks nobody"


def test_optimizers_in_one_strategy_go_on_where_the_one_before_them_stopped(pooled: Swept) -> None:
    prefixes = ["mipro", "mipro -> gepa", "mipro -> gepa -> mipro"]
    assert [pooled[prefix].outcome for prefix in prefixes] == [
        (40.0, instruction(1), 0, 0),
        (60.0, instruction(2), 0, 0),
        (80.0, instruction(3), 0, 0),
    ]


def test_gepa_twice_reads_no_files_of_its_first_run(pooled: Swept) -> None:
    # Its log_dir is each step's own: in the first step's it would return that step's best.
    assert [pooled[prefix].outcome[:2] for prefix in ("gepa", "gepa -> gepa")] == [
        (40.0, instruction(1)),
        (60.0, instruction(2)),
    ]


def test_a_program_is_fine_tuned_on_the_prompts_that_it_will_be_asked_with(pooled: Swept) -> None:
    assert pooled["mipro -> w"].outcome == (70.0, instruction(1), 0, 0)
    of_mipro = [prompts for prompts in pooled.trained_on if instruction(1) in prompts[0]]
    assert len(pooled.trained_on) == 3
    assert len(of_mipro) == 1
    assert all(instruction(1) in asked for asked in of_mipro[0])


@pytest.mark.parametrize("prefix", ["", *(f"w -> {key}" for key in AFTER_W), "mipro -> gepa", "mipro -> gepa -> mipro"])
def test_requests_in_flight_stay_within_num_threads(pooled: Swept, prefix: str) -> None:
    assert 1 < max(request["in_flight"] for request in pooled[prefix].requests) <= THREADS
    assert pooled.most_in_flight == THREADS, "it is used, too"


@pytest.fixture(scope="module")
def others(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """The rest of DSPy's optimizers."""
    strategies = ["labeled", "optuna", "rules", "together", "knn", "ensemble"]
    return Swept(tmp_path_factory.mktemp("others"), f"{OPTIMIZERS}:other_optimizers", strategies, ["knn", "ensemble"])


@pytest.mark.parametrize(
    ("optimizer", "score", "hints", "demos"),
    [("labeled", 40.0, 0, 2), ("optuna", 30.0, 0, 1), ("rules", 50.0, 0, 3), ("together", 80.0, 2, 2)],
)
def test_the_other_optimizers_change_the_program_as_they_should(
    others: Swept, optimizer: str, score: float, hints: int, demos: int
) -> None:
    found, instructions, shown, _ = others[optimizer].outcome
    assert (found, shown) == (score, demos)
    assert instructions.startswith(instruction(hints))


@pytest.mark.parametrize(
    ("strategy", "kind", "lost"),
    [
        ("knn", "KNNFewShot", "the attribute forward (which was added)"),
        ("ensemble", "Ensemble", "its class (EnsembledProgram, the task's program is a Predict)"),
    ],
)
def test_an_optimizer_whose_program_cannot_be_kept_is_refused_by_name(
    others: Swept, strategy: str, kind: str, lost: str
) -> None:
    assert f"{kind} (optimizer {strategy!r}) made a program that would not be kept" in others.errors[strategy]
    assert lost in others.errors[strategy]
    assert [candidate.prefix for candidate in others.result.candidates if strategy in candidate.prefix] == []
    assert others.all_requests_are_candidates, "nothing is paid for a program that is refused"


def test_what_dspy_itself_cannot_build_is_told_before_anything_starts() -> None:
    config = make_config({"task": f"{OPTIMIZERS}:avatar", "strategies": ["avatar"], "model": "org/model"})
    with pytest.raises(bt_ray.BtRayError, match="TypedPredictor"):
        check_sweep(config, None)


@pytest.mark.parametrize("sweep", ["pooled", "others"])
def test_each_candidate_scores_what_its_program_scores_when_it_is_loaded(sweep: str, request: pytest.FixtureRequest) -> None:
    swept: Swept = request.getfixturevalue(sweep)
    valset = double().valset
    for candidate in {candidate.prefix: candidate for candidate in swept.result.candidates}.values():
        with swept.loaded(candidate) as program:
            evaluated = dspy.Evaluate(devset=valset, metric=exact, num_threads=THREADS)(program)
        scores = tuple(float(score) for _, _, score in evaluated.results)
        assert (candidate.prefix, scores) == (candidate.prefix, candidate.example_scores)


def test_without_optimizers_p_and_w_are_those_of_better_together(local_ray: None, tmp_path: Path) -> None:
    swept = Swept(tmp_path, f"{OPTIMIZERS}:default_optimizers", ["p -> w", "w -> p"])
    # `p` finds 16 labelled examples no worse than anything bootstrapped; the student teaches itself what it answers right.
    assert {prefix: swept[prefix].outcome for prefix in ("", "p", "p -> w", "w", "w -> p")} == {
        "": (20.0, instruction(0), 0, 0),
        "p": (50.0, instruction(0), 16, 0),
        "p -> w": (80.0, instruction(0), 16, 0),
        "w": (50.0, instruction(0), 0, 0),
        "w -> p": (80.0, instruction(0), 16, 0),
    }
    assert {request["weights"] for request in swept["w -> p"].requests} == {swept["w"].weights}
    assert sorted(len(prompts) for prompts in swept.trained_on) == [4, 10]


@pytest.fixture(scope="module")
def overridden(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """Each optimizer has arguments of its own: 2xx to train on, 3xx to choose by, and a teacher."""
    strategies = ["fewshot", "search", "mipro", "w", "mipro -> fewshot"]
    return Swept(tmp_path_factory.mktemp("overridden"), f"{OPTIMIZERS}:with_compile_args", strategies)


def test_a_trainset_of_an_optimizers_own_is_what_it_trains_on(overridden: Swept) -> None:
    assert overridden["fewshot"].outcome == (50.0, instruction(0), 3, 2)
    assert all(200 <= number < 210 for number in overridden["fewshot"].demo_numbers)
    assert overridden["w"].outcome == (50.0, instruction(0), 0, 0)
    (prompts,) = overridden.trained_on
    assert sorted(int(text.split("number ")[-1].split()[0]) for text in prompts) == list(range(200, 210))


def test_a_valset_of_an_optimizers_own_chooses_while_the_tasks_valset_scores(overridden: Swept) -> None:
    for prefix in ("search", "mipro"):
        own = {number for number in overridden[prefix].numbers if number >= 300}
        assert own == set(range(300, 310))
        assert overridden[prefix].numbers >= set(range(20))
    assert overridden["search"].outcome == (50.0, instruction(0), 3, 3)
    assert overridden["mipro"].outcome == (40.0, instruction(1), 0, 0)


def test_a_teacher_of_an_optimizers_own_replaces_the_tasks(overridden: Swept) -> None:
    # The task's teacher knows the trainset alone, and raises when it is asked for 2xx.
    bootstrapped = overridden["fewshot"].demo_numbers[:2]
    assert bootstrapped == [200, 201], "this teacher answers everything right"
    assert not overridden["fewshot"].numbers & set(range(200, 210)), "and asks no model"
    assert not overridden["search"].numbers & set(range(100, 120)), "as little as the task's teacher, which `search` keeps"
    assert overridden["mipro"].numbers & set(range(200, 210)), "with None, the student teaches itself"


def test_a_gold_label_teacher_makes_demos_for_an_instruction_that_was_improved(overridden: Swept) -> None:
    assert overridden["mipro -> fewshot"].outcome == (70.0, instruction(1), 3, 2)


@dataclass(frozen=True)
class WithApi:
    """A sweep whose optimizers ask an API as well."""

    swept: Swept
    api: Api

    def asked(self, prefix: str) -> list[dict[str, Any]]:
        """What the API was asked during a step."""
        return [request for request in self.api.log() if during(self.swept[prefix].candidate, request["time"])]


@pytest.fixture(scope="module")
def with_api(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WithApi]:
    folder = tmp_path_factory.mktemp("with_api")
    with running_api(folder, "optimizer_tasks.py", "tasks.py") as api:
        yield WithApi(Swept(folder, f"{api.tasks}:by_an_api", ["mipro", "gepa", "bootstrapped", "simba"]), api)


@pytest.mark.parametrize("optimizer", ["mipro", "gepa"])
def test_an_api_proposes_and_the_pool_does_the_task(with_api: WithApi, optimizer: str) -> None:
    step = with_api.swept[optimizer]
    assert step.outcome == (40.0, instruction(1), 0, 0)
    assert step.proposals == 0
    assert {request["weights"] for request in step.requests} == {with_api.swept[""].weights}
    assert {request["question"] for request in with_api.asked(optimizer)} == {None}


def test_the_feedback_of_a_metric_reaches_gepas_reflection(with_api: WithApi) -> None:
    assert [candidate.example_scores for candidate in with_api.swept.result.candidates if candidate.prefix == "gepa"] == [
        tuple(float(number % 10 < 4) for number in range(20))
    ]
    (reflection,) = with_api.asked("gepa")
    assert "Right." in reflection["prompt"]
    assert "not a word" in reflection["prompt"]


def test_mipros_task_model_bootstraps_and_the_pool_does_the_rest(with_api: WithApi) -> None:
    # MIPROv2 gives its task_model to copies that lost their LM: those that bootstrap. It evaluates with the student's own.
    step = with_api.swept["bootstrapped"]
    assert step.outcome[:3] == (50.0, instruction(1), 1)
    assert step.proposals > 0
    assert step.numbers == set(range(20))
    asked = {int(request["question"]) for request in with_api.asked("bootstrapped")}
    assert asked
    assert asked <= set(range(100, 120))


def test_simba_learns_from_a_teacher_lm_that_an_api_serves(with_api: WithApi) -> None:
    step = with_api.swept["simba"]
    assert step.outcome == (40.0, f"{instruction(0)}\n\n{instruction(1)}", 0, 0)
    assert step.proposals > 0, "the advice is the student's"
    assert {int(request["question"]) for request in with_api.asked("simba")} == set(range(100, 120))

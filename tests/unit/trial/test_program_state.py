"""What is kept of a program, and what of one would be lost is told by its name."""

import json
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from enum import Enum
from types import MethodType
from typing import Any

import dspy
import numpy as np
import pydantic
import pytest
from dspy.teleprompt import KNNFewShot

from bt_ray.trial.program_losses import LostInKeeping, refuse_losses
from bt_ray.trial.program_state import load_state, program_state


class Retriever:
    """Counts what it is asked, and remembers its answers."""

    def __init__(self) -> None:
        self.k = 3
        self.asked = 0
        self.answers: dict[str, str] = {}

    def find(self, query: str) -> str:
        self.asked += 1
        self.answers[query] = query * self.k
        return self.answers[query]


class Program(dspy.Module):  # type: ignore[misc]
    """Writes into itself when it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = dspy.Predict("question, price: float -> answer")
        self.steps = [dspy.ChainOfThought("question -> answer")]
        self.retriever = Retriever()
        self.runs = 0
        self.seen: list[str] = []
        self.limit = 5
        self.words = ["a", "b"]
        self.table = np.zeros(3)
        self.parts = {"one": {"two": 1}}

    def forward(self, question: str) -> dspy.Prediction:
        self.runs += 1
        self.remember(question)
        self.last = self.retriever.find(question)
        return dspy.Prediction(answer=" ".join(self.words[: self.limit]))

    def remember(self, question: str) -> None:
        self.seen.append(question)


class Colour(Enum):
    RED = "red"


class Item(pydantic.BaseModel):
    name: str
    made: date
    price: Decimal


def task_program() -> Program:
    program = Program()
    program.set_lm(dspy.LM("openai/gpt-x", api_key="secret", temperature=0.3, max_tokens=100))
    return program


def rebuilt(program: dspy.Module, origin: dspy.Module) -> dspy.Module:
    """`program` from what is kept of it: `origin` is what the task gives."""
    made = origin.deepcopy()
    load_state(made, program_state(program, origin))
    refuse_losses(program, made)
    return made


def losses(change: Callable[[Program], Any]) -> tuple[str, ...]:
    """What would be lost of a program that was changed."""
    origin = task_program()
    program = origin.deepcopy()
    changed = change(program)
    with pytest.raises(LostInKeeping) as caught:
        rebuilt(changed if isinstance(changed, dspy.Module) else program, origin)
    return caught.value.losses


def test_all_that_dspys_optimizers_change_is_kept() -> None:
    origin = task_program()
    program = origin.deepcopy()
    program.first.signature = program.first.signature.with_instructions("Be brief.").with_updated_fields(
        "answer", desc="short"
    )
    program.first.demos = [
        dspy.Example(question="q", price=1.5, answer="a", augmented=True),
        {"question": "r", "answer": "b"},
    ]
    program.candidate_programs, program.score, program._compiled = [program], 3.0, True
    made = rebuilt(program, origin)
    assert made.first.signature.instructions == "Be brief."
    assert made.first.signature.fields["answer"].json_schema_extra["desc"] == "short"
    assert [demo["question"] for demo in made.first.demos] == ["q", "r"]
    assert made.first.demos[0]["augmented"] is True


def test_the_file_is_dspys_own(tmp_path: Any) -> None:
    origin = task_program()
    program = origin.deepcopy()
    program.first.config = {"temperature": 0.9, "n": 3}
    (tmp_path / "program.json").write_bytes(program_state(program, origin))
    loaded = Program()
    loaded.load(str(tmp_path / "program.json"))
    assert loaded.first.config == {"temperature": 0.9, "n": 3}
    assert loaded.first.lm is None


@pytest.mark.parametrize(
    "value",
    [
        "text", 1, 1.5, None, True, ["a", "b"], {"a": [1]}, Decimal("1.50"), date(2026, 1, 2), {3}, (1, 2), b"bytes",
        Colour.RED,
        [Item(name="x", made=date(2026, 1, 2), price=Decimal("1.50"))], {1: "one"}, {"a": {Decimal("2.0")}},
    ],
    ids=str,
)  # fmt: skip
def test_a_demo_reads_the_same_whatever_it_holds(value: Any) -> None:
    class Shown(dspy.Signature):  # type: ignore[misc]
        given: Any = dspy.InputField()
        answer: Any = dspy.OutputField()

    origin = dspy.Predict(Shown)
    program = origin.deepcopy()
    program.demos = [dspy.Example(given=value, answer=value)]
    made = rebuilt(program, origin)
    for adapter in (dspy.ChatAdapter(), dspy.JSONAdapter(), dspy.XMLAdapter()):
        assert adapter.format_demos(Shown, made.demos) == adapter.format_demos(Shown, program.demos)


@pytest.mark.parametrize(
    ("value", "said"),
    [(float("nan"), "(float)"), (("a", "b"), "(tuple)"), (2**70, "'question'")],
    ids=str,
)
def test_a_demo_that_would_read_otherwise_is_told(value: Any, said: str) -> None:
    def change(program: Program) -> None:
        program.first.demos = [{"question": "q", "answer": "a"}, {"question": value, "answer": "b"}]

    (lost,) = losses(change)
    assert lost.startswith("demo 2 of predictor first")
    assert "question" in lost
    assert said in lost


def test_settings_of_predictors_and_lms_are_kept_where_json_holds_them() -> None:
    origin = task_program()
    program = origin.deepcopy()
    program.first.config["temperature"] = 0.9
    hotter = program.first.lm.copy(temperature=0.8, stop=["\n"], max_tokens=None)
    program.first.lm = program.steps[0].predict.lm = hotter
    state = json.loads(program_state(program, origin))
    assert "secret" not in json.dumps(state)
    assert state["first"]["config"] == {"temperature": 0.9}
    assert state["steps[0].predict"].get("config") is None
    made = rebuilt(program, origin)
    assert made.first.lm.kwargs == hotter.kwargs
    assert made.first.lm is made.steps[0].predict.lm, "one LM is one again"
    assert rebuilt(origin.deepcopy(), origin).first.lm.kwargs == origin.first.lm.kwargs


def test_what_a_run_leaves_in_a_program_is_not_lost() -> None:
    origin = task_program()
    program = origin.deepcopy()
    program(question="q")
    assert (program.runs, program.seen, program.retriever.asked) == (1, ["q"], 1)
    rebuilt(program, origin)


def test_a_method_that_is_bound_to_the_program_stays() -> None:
    class Bound(Program):
        def __init__(self) -> None:
            super().__init__()
            self.on_question = self.remember

    origin = Bound()
    rebuilt(origin.deepcopy(), origin)


def forward(self: Program, question: str) -> dspy.Prediction:
    return dspy.Prediction(answer=question)


class Other(Program):
    pass


def changed(**attributes: Any) -> Callable[[Program], None]:
    return lambda program: [setattr(program, *item) for item in attributes.items()] and None


CHANGES: list[tuple[Callable[[Program], Any], str]] = [
    (changed(extra=1), "the attribute extra (which was added)"),
    (changed(limit=6), "the attribute limit"),
    (changed(words=["a", "c"]), "the attribute words[1]"),
    (changed(words=("a", "b")), "the attribute words (tuple, kept as list)"),
    (changed(table=np.ones(3)), "the attribute table"),
    (lambda p: p.parts["one"].update(two=2), "the attribute parts['one']['two']"),
    (lambda p: setattr(p.retriever, "k", 4), "the attribute retriever.k"),
    (lambda p: delattr(p, "limit"), "that the attribute limit is gone"),
    (lambda p: setattr(p, "forward", MethodType(forward, p)), "the attribute forward (which was added)"),
    (lambda p: setattr(p.steps[0], "forward", MethodType(forward, p)), "the attribute steps[0].forward (which was added)"),
    (lambda p: Other(), "its class (Other, the task's program is a Program)"),
    (lambda p: setattr(p, "second", dspy.Predict("a -> b")), "predictor second (which was added)"),
    (lambda p: delattr(p, "steps"), "that predictor steps[0].predict is gone, or frozen"),
    (lambda p: setattr(p.first, "demos", None), "the demos of predictor first (NoneType)"),
    (lambda p: setattr(p.first, "demos", [{"question": "q"}, ["a"]]), "demo 2 of predictor first (list)"),
    (lambda p: p.first.config.update(stop=Colour.RED), "config['stop'] of predictor first"),
    (lambda p: p.first.config.update(api_key="k"), "config['api_key'] of predictor first"),
    (
        lambda p: setattr(p.first, "signature", p.first.signature.append("more", dspy.OutputField())),
        "the fields of predictor first (question, price, answer, more; the task's are question, price, answer)",
    ),
    (
        lambda p: setattr(p.first, "signature", p.first.signature.with_updated_fields("answer", type_=int)),
        "the field 'answer' of predictor first: its type, or what it says besides prefix and description",
    ),
    (lambda p: setattr(p.first, "lm", p.first.lm.copy(response_format=Item)), "the LM of predictor first: its settings"),
    (lambda p: setattr(p.first, "lm", Silent("openai/gpt-x")), "the LM of predictor first: its class (Silent, kept as LM)"),
]  # fmt: skip


class Silent(dspy.LM):  # type: ignore[misc]
    pass


@pytest.mark.parametrize(("change", "said"), CHANGES, ids=[said for _, said in CHANGES])
def test_what_would_be_lost_is_told_by_its_name(change: Callable[[Program], Any], said: str) -> None:
    assert said in losses(change)


def test_knn_few_shot_is_told_by_what_it_does() -> None:
    def embed(texts: list[str]) -> Any:
        return np.array([[float(len(text))] for text in texts])

    trainset = [dspy.Example(question=f"q{n}", answer="a").with_inputs("question") for n in range(3)]

    def compiled(program: Program) -> Any:
        return KNNFewShot(k=1, trainset=trainset, vectorizer=dspy.Embedder(embed)).compile(program)

    assert "the attribute forward (which was added)" in losses(compiled)

"""Seeds have draws of their own, where there is anything to draw."""

from typing import Any

import dspy
import pytest
from dspy.clients.embedding import Embedder
from dspy.lm15 import Message, Request, Response, Usage

from bt_ray.trial.seeded_cache import draw_by_seed, is_sampled


class Counting:
    """An engine that answers with how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def complete(self, request: Request) -> Response:
        self.asked += 1
        said = Message.assistant(f"answer {self.asked}")
        return Response(id="1", model=request.model, message=said, finish_reason="stop", usage=Usage())


def drawn(seed: int, lm: dspy.LM, question: str) -> str:
    with draw_by_seed(seed):
        return str(lm(question)[0])


@pytest.mark.parametrize("temperature", [None, 0.5])
def test_each_seed_has_an_answer_of_its_own_and_has_it_again(temperature: float | None) -> None:
    lm = dspy.LM("openai/x", temperature=temperature, engine=Counting())
    question = f"at {temperature}?"
    first = [drawn(seed, lm, question) for seed in (0, 1, 2)]
    assert len(set(first)) == 3
    assert [drawn(seed, lm, question) for seed in (0, 1, 2)] == first
    assert lm(question)[0] == first[0], "seed 0 has what DSPy has without a sweep"


def test_what_is_not_sampled_is_asked_for_once() -> None:
    lm = dspy.LM("openai/x", temperature=0.0, engine=Counting())
    assert len({drawn(seed, lm, "at 0?") for seed in (0, 1, 2)}) == 1


def test_embeddings_are_not_sampled() -> None:
    asked: list[Any] = []

    def embed(texts: list[str]) -> list[list[float]]:
        asked.append(texts)
        return [[0.0] for _ in texts]

    for seed in (1, 2):
        with draw_by_seed(seed):
            Embedder(embed, caching=True)(["a text"])
    assert not is_sampled({"_fn_identifier": "embed", "texts": ["a text"]})


@pytest.mark.parametrize(
    ("request_", "sampled"),
    [
        ({"model": "m", "messages": [], "temperature": 0}, False),
        ({"model": "m", "messages": [], "temperature": 0.1}, True),
        ({"model": "m", "prompt": "x"}, True),
        ({"request": {"messages": [], "config": {"temperature": 0.0}}, "rollout_id": None}, False),
        ({"request": {"messages": [], "config": {"temperature": 1.0}}, "rollout_id": 3}, True),
        ({"request": {"messages": []}}, True),
        ({"provider": "typesafe", "state": {}}, False),
    ],
)
def test_what_is_sampled_shows_in_the_request(request_: dict[str, Any], sampled: bool) -> None:
    assert is_sampled(request_) == sampled


def test_dspys_cache_is_as_it_was_afterwards() -> None:
    before = dspy.cache
    with draw_by_seed(3):
        assert dspy.cache.enable_memory_cache == before.enable_memory_cache
    assert dspy.cache is before

"""The loss that is fast on CPU is the loss of the completion's tokens, with the same gradients."""

from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

IGNORED = -100


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).train()


def batch(prompts: list[list[int]], completions: list[list[int]]) -> dict[str, Any]:
    """Conversations padded on the right, with labels on the completions alone."""
    rows = [p + c for p, c in zip(prompts, completions, strict=True)]
    longest = max(map(len, rows))
    labels = [[IGNORED] * len(p) + c for p, c in zip(prompts, completions, strict=True)]
    return {
        "input_ids": torch.tensor([row + [0] * (longest - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
        "labels": torch.tensor([row + [IGNORED] * (longest - len(row)) for row in labels]),
    }


SHARED = list(range(5, 25))
BATCHES = {
    "a common prefix": batch([[*SHARED, 30], [*SHARED, 31, 32, 33]], [[40, 41, 42], [50, 51]]),
    "no common prefix": batch([[1, *SHARED], [2, *SHARED]], [[40, 41], [50]]),
    "one conversation": batch([SHARED], [[40, 41]]),
    "equal prompts": batch([SHARED, SHARED], [[40, 41], [50]]),
    "equal conversations": batch([SHARED, SHARED], [[40, 41], [40, 41]]),
}


@pytest.mark.parametrize("name", BATCHES)
def test_loss_and_gradients_are_those_of_the_plain_forward(model: Any, name: str) -> None:
    from bt_ray.training.trainer import CpuTrainer

    inputs = BATCHES[name]
    trainer: Any = SimpleNamespace(args=SimpleNamespace(gradient_checkpointing=False))

    model.zero_grad()
    expected = model(**inputs).loss
    expected.backward()
    gradients = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}

    model.zero_grad()
    loss = CpuTrainer.compute_loss(trainer, model, inputs)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-3, atol=1e-6)

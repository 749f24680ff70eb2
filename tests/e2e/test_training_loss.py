"""What the trainer computes: a loss that is fast on CPU and equal to the plain one, for the layers that are trained."""

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
    from bt_ray.slot.training.trainer import CpuTrainer

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


@pytest.mark.parametrize(("count", "first"), [(1, 2), (2, 1), (9, 0)])
def test_the_last_layers_alone_are_trained_by_either_method(count: int, first: int) -> None:
    from copy import deepcopy

    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from bt_ray.settings.config import TrainConfig
    from bt_ray.slot.training.layers import freeze_below, last_layers
    from bt_ray.slot.training.trainer import make_lora_config

    config = LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
    model = LlamaForCausalLM(config)
    adapted = get_peft_model(deepcopy(model), make_lora_config(TrainConfig(layers=count), model))
    freeze_below(last_layers(model, count), model)

    def trained(module: Any) -> set[int]:
        names = [name for name, parameter in module.named_parameters() if parameter.requires_grad and ".layers." in name]
        return {int(name.partition(".layers.")[2].partition(".")[0]) for name in names}

    assert trained(model) == trained(adapted) == set(range(first, 3))
    assert not model.get_input_embeddings().weight.requires_grad
    assert model.model.norm.weight.requires_grad

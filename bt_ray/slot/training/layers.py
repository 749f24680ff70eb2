"""Training the last layers of a model alone: the others stay as they are, which spares their part of the backward pass."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel


def last_layers(model: PreTrainedModel, count: int) -> Sequence[torch.nn.Module]:
    """The last `count` layers of a model, or all if it has fewer."""
    layers: Sequence[torch.nn.Module] = model.get_decoder().layers
    return layers[max(0, len(layers) - count) :]


def freeze_below(trained: Sequence[torch.nn.Module], model: PreTrainedModel) -> None:
    """Leave the embeddings as they are, and the layers that are not in `trained`."""
    kept = set(trained)
    for module in (model.get_input_embeddings(), *model.get_decoder().layers):
        if module not in kept:
            module.requires_grad_(requires_grad=False)


def linear_modules(layers: Sequence[torch.nn.Module], model: PreTrainedModel) -> list[str]:
    """The names of the linear modules in these layers of a model."""
    of_layers = {module for layer in layers for module in layer.modules() if isinstance(module, torch.nn.Linear)}
    return [name for name, module in model.named_modules() if module in of_layers]

"""Which conversations make a batch: those of about the same length, where that saves padding.

A batch is as long as its longest conversation, and a step computes the padding of the others too. The order stays random:
within a few batches at a time conversations are sorted by length, and the batches come in a random order.
"""

import random
from collections.abc import Callable, Iterator, Sequence

POOL = 16
"""Batches whose conversations are sorted by length together."""
WORTH = 0.1
"""Sort by length if a random order has at least this share of padding."""


class BatchesByLength:
    """A sampler: the order of the conversations in each epoch, each `batch_size` of which make a batch.

    Args:
        lengths: Tokens of each conversation.
        batch_size: Conversations in a batch, at most: only the last one may be smaller.
        seed: For the order.
        epoch: The epoch that begins, so that a training which goes on in its middle finds the same order again.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, epoch: Callable[[], int]) -> None:
        self._lengths = lengths
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"{self._seed} {self._epoch()}")  # noqa: S311 - an order, no secret
        order = random_order(len(self._lengths), draw)
        batches = []
        for start in range(0, len(order), POOL * self._batch_size):
            pool = sorted(order[start : start + POOL * self._batch_size], key=lambda index: self._lengths[index])
            batches += [pool[first : first + self._batch_size] for first in range(0, len(pool), self._batch_size)]
        last = [batches.pop()] if len(order) % self._batch_size else []
        draw.shuffle(batches)
        for batch in [*batches, *last]:
            yield from batch


def worth_sorting(lengths: Sequence[int], batch_size: int) -> bool:
    """Whether batches in a random order have much padding."""
    draw = random.Random(0)  # noqa: S311 - an order, no secret
    return padding_share([lengths[index] for index in random_order(len(lengths), draw)], batch_size) >= WORTH


def padding_share(lengths: Sequence[int], batch_size: int) -> float:
    """The share of what is computed that is padding, where each `batch_size` of these make a batch."""
    batches = [lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
    return 1 - sum(lengths) / sum(max(batch) * len(batch) for batch in batches)


def random_order(count: int, draw: random.Random) -> list[int]:
    return draw.sample(range(count), count)

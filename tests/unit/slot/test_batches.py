"""Batches of conversations of about the same length: in a random order still, and with less padding."""

from hypothesis import given
from hypothesis import strategies as st

from bt_ray.slot.training.batches import BatchesByLength, padding_share, worth_sorting

LENGTHS = st.lists(st.integers(1, 2000), min_size=1, max_size=300)


def order(lengths: list[int], batch_size: int, seed: int = 0, epoch: int = 0) -> list[int]:
    return list(BatchesByLength(lengths, batch_size, seed, lambda: epoch))


@given(LENGTHS, st.integers(1, 9), st.integers(0, 3), st.integers(0, 3))
def test_each_conversation_comes_once_in_an_epoch_and_its_order_is_known(
    lengths: list[int], batch_size: int, seed: int, epoch: int
) -> None:
    found = order(lengths, batch_size, seed, epoch)
    assert sorted(found) == list(range(len(lengths)))
    assert found == order(lengths, batch_size, seed, epoch)


@given(st.integers(0, 99), st.integers(2, 9))
def test_there_is_little_padding_left(seed: int, batch_size: int) -> None:
    lengths = [50 + 37 * number % 1500 for number in range(16 * batch_size)]
    sorted_ones = [lengths[index] for index in order(lengths, batch_size, seed)]
    assert padding_share(sorted_ones, batch_size) < 0.1
    assert worth_sorting(lengths, batch_size)


def test_batches_come_in_another_order_in_each_epoch_and_not_by_length() -> None:
    lengths = [50 + 37 * number % 1500 for number in range(64)]
    first, second = ([lengths[index] for index in order(lengths, 4, epoch=epoch)[::4]] for epoch in (0, 1))
    assert first != second
    assert first not in (sorted(first), sorted(first, reverse=True))


def test_conversations_that_are_about_equally_long_are_not_sorted() -> None:
    assert not worth_sorting([500 + number % 40 for number in range(50)], 4)
    assert not worth_sorting([7], 4)

"""The canary: whether an engine answers as given weights do.

It is the log-probabilities of the tokens of a few fixed sequences, one forward pass each. Whoever trained the weights says
what they should be, within a tolerance, and at which tokens that is certain enough to be compared; an engine that was seen
to have loaded them right says it for good.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

TOLERANCE = 0.25
"""Between a trainer's log-probabilities and an engine's of the same weights. Measured in bfloat16: 0.18 at most."""
TOLERANCE_FLOAT32 = 0.01
"""The same where both compute in float32. Measured: 0.00004 at most; other kernels differ more than these did."""
FLOAT32 = ("float32", "float")
"""What vLLM calls it."""
CONFIDENT = -0.7
"""Only tokens at least this likely are compared: those below move more with the last bits of the arithmetic."""
NOISE = {"cpu": 0.0, "gpu": 0.02}
"""Between two loads of the same weights by the same engine. On CPU they are equal to the last bit; on GPU, where nobody
guarantees that, it is far below what other weights change."""
FIXED_SEQUENCES = tuple(tuple((seed * step * step + 11 * step) % 190 + 5 for step in range(24)) for seed in (3, 7, 13, 17))
"""Token ids that every vocabulary has, for weights that nobody trained here."""


@dataclass(frozen=True)
class Canary:
    """What a trainer says of its weights.

    Attributes:
        sequences: Token ids.
        positions: For each sequence, the tokens to compare: 1 is the second token.
        logprobs: For each sequence, what they should be, in the order of `positions`.
        margin: How far off the weights that were fine-tuned are at one of these tokens, at most.
        dtype: What the trainer computed them in.
    """

    sequences: tuple[tuple[int, ...], ...]
    positions: tuple[tuple[int, ...], ...]
    logprobs: tuple[tuple[float, ...], ...]
    margin: float
    dtype: str = "bfloat16"

    def tolerance(self, dtype: str | None) -> float:
        """What an engine that computes in `dtype` may be off by; None: it chooses by itself."""
        return TOLERANCE_FLOAT32 if self.dtype in FLOAT32 and dtype in FLOAT32 else TOLERANCE

    def tells_from_parent(self, tolerance: float) -> bool:
        """Whether the weights that were fine-tuned fail it by far."""
        return self.margin > 2 * tolerance

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        sequences, positions, logprobs = (
            tuple(tuple(row) for row in values[name]) for name in ("sequences", "positions", "logprobs")
        )
        if "margin" not in values:  # written before trainers told it: whether it is above twice the tolerance
            return cls(sequences, positions, logprobs, 4 * TOLERANCE if values["discriminating"] else 0.0)
        return cls(sequences, positions, logprobs, float(values["margin"]), str(values["dtype"]))


def make_canary(
    sequences: Sequence[Sequence[int]],
    completions: Sequence[int],
    logprobs: Sequence[Sequence[float]],
    parents: Sequence[Sequence[float]],
    dtype: str,
) -> Canary:
    """What a trainer says.

    Args:
        sequences: Token ids.
        completions: For each sequence, where what was learnt begins.
        logprobs: Of each token but the first, by the new weights.
        parents: The same, by the weights that they were trained from.
        dtype: What both were computed in.
    """
    positions = tuple(
        tuple(position for position in range(start, len(tokens)) if row[position - 1] >= CONFIDENT)
        for tokens, start, row in zip(sequences, completions, logprobs, strict=True)
    )
    said = tuple(tuple(row[p - 1] for p in picked) for row, picked in zip(logprobs, positions, strict=True))
    before = tuple(tuple(row[p - 1] for p in picked) for row, picked in zip(parents, positions, strict=True))
    differences = [
        abs(new - old) for news, olds in zip(said, before, strict=True) for new, old in zip(news, olds, strict=True)
    ]
    return Canary(tuple(map(tuple, sequences)), positions, said, max(differences, default=0.0), dtype)


def difference(canary: Canary, answered: Sequence[Sequence[float]], tolerance: float) -> str | None:
    """Where an engine's answers differ from what a trainer said, None if they do not.

    Args:
        canary: What the trainer said.
        answered: The engine's log-probability of each token but the first, for each sequence.
        tolerance: What they may differ by.
    """
    for number, (positions, said) in enumerate(zip(canary.positions, canary.logprobs, strict=True)):
        for position, expected in zip(positions, said, strict=True):
            got = answered[number][position - 1]
            if not abs(got - expected) <= tolerance:  # NaN is no agreement
                return f"token {position} of sequence {number} has log-probability {got:.3f}, and should have {expected:.3f}"
    return None


def describe_change(before: Sequence[Sequence[float]], now: Sequence[Sequence[float]], platform: str) -> str | None:
    """Where an engine's answers differ from earlier ones of an engine of this platform, None if they do not."""
    noise = NOISE[platform.partition(":")[0]]
    for number, (rows, answered) in enumerate(zip(before, now, strict=True)):
        for position, (expected, got) in enumerate(zip(rows, answered, strict=True), start=1):
            if not abs(got - expected) <= noise:
                return f"token {position} of sequence {number} has log-probability {got:.4f}, and had {expected:.4f}"
    return None

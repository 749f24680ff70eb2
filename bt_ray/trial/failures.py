"""Whose failure an exception is. Nothing else decides that.

The infrastructure's (a server, a node or the storage is lost, a deadline passed): retried, never a score, never committed.
The user's (the metric or an optimizer raises, the settings are wrong): the strategy ends early with its best so far. The
model's (an answer that does not parse, a prompt that does not fit): a score of 0 for that example, as DSPy does.
"""

import builtins
import errno
import sys
from collections.abc import Iterator
from enum import Enum

import dspy
from dspy.lm15 import LM15Error
from dspy.utils.exceptions import (
    AdapterParseError,
    ContextWindowExceededError,
    LMRateLimitError,
    LMServerError,
    LMTimeoutError,
    LMTransportError,
)

from bt_ray.errors import BtRayError, InfrastructureError, InfrastructureFailure
from bt_ray.models import OTHER_WEIGHTS, REFUSED


class Side(Enum):
    """Whose failure it is."""

    INFRASTRUCTURE = "infrastructure"
    USER = "user"
    MODEL = "model"


OURS = (InfrastructureError, InfrastructureFailure)
LOST_ANSWER = (
    dspy.lm15.TransportError,
    dspy.lm15.TimeoutError,
    dspy.lm15.ServerError,
    dspy.lm15.RateLimitError,
    LMTransportError,
    LMTimeoutError,
    LMServerError,
    LMRateLimitError,
)
"""No answer came from a model server, or from an API: refused, reset, too late, HTTP 5xx, too many requests (429)."""
LOST_MACHINE = (builtins.ConnectionError, builtins.TimeoutError, MemoryError)
FAILING_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EROFS, errno.ENODEV, errno.ENXIO)
OF_THE_MODEL = (AdapterParseError, ContextWindowExceededError, dspy.lm15.ContextLengthError)


def side_of(error: BaseException) -> Side:
    """Whose failure `error` is: its own kind decides, or that of what it was raised from."""
    side = Side.USER
    for cause in _causes(error):
        if isinstance(cause, BtRayError | InfrastructureFailure):  # whoever raised it has decided
            return Side.INFRASTRUCTURE if isinstance(cause, OURS) else Side.USER
        if isinstance(cause, LOST_MACHINE) or is_lost_answer(cause) or _is_failing_disk(cause) or _is_rays_own(cause):
            return Side.INFRASTRUCTURE
        if isinstance(cause, OF_THE_MODEL):
            side = Side.MODEL
    return side


def is_lost_answer(error: BaseException) -> bool:
    """Whether a model server, or an API, did not answer, for no fault of the request's."""
    return isinstance(error, LOST_ANSWER) or (
        isinstance(error, LM15Error) and getattr(error, "status", None) == OTHER_WEIGHTS
    )


def is_refusal(error: BaseException) -> bool:
    """Whether a server's guard refused a request, since its server serves other weights, or is going to."""
    refused = getattr(error, "provider_code", None) == REFUSED or getattr(error, "status", None) == OTHER_WEIGHTS
    return isinstance(error, LM15Error) and refused


def _is_failing_disk(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in FAILING_DISK


def _is_rays_own(error: BaseException) -> bool:
    """Whether Ray lost something: an actor, a node, an object. An exception that a task raised is not Ray's."""
    ray = sys.modules.get("ray.exceptions")
    return ray is not None and isinstance(error, ray.RayError) and not isinstance(error, ray.RayTaskError)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """`error`, what it was raised from, what that was raised from, and so on."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        inner = getattr(current, "cause", None)  # where Ray keeps what a task raised
        current = inner if isinstance(inner, BaseException) else current.__cause__

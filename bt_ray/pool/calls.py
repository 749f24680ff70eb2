"""Calls of actors, with bt_ray's own errors."""

from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from bt_ray.errors import BtRayError, InfrastructureError, ServerError


class ActorGone(InfrastructureError):
    """An actor died, is being restarted, or cannot be reached."""


def ask(method: Any, *arguments: Any, timeout_s: float | None = None, **named: Any) -> Any:
    """Call an actor's method and wait; its own errors come back as they were raised there.

    Raises:
        InfrastructureError: The actor is gone, or did not answer in time.
    """
    try:
        return ray.get(method.remote(*arguments, **named), timeout=timeout_s)
    except GetTimeoutError as error:
        raise ServerError(f"An actor did not answer within {timeout_s} s.") from error
    except RayTaskError as error:
        if isinstance(error.cause, BtRayError):
            raise error.cause from error
        raise InfrastructureError(f"{type(error.cause).__name__}: {error.cause}") from error
    except RayError as error:
        raise ActorGone(str(error).strip().partition("\n")[0]) from error

"""Whether an actor still lives, told by Ray within a fraction of a second of its end, however it ended."""

import asyncio
from typing import Any

import ray
from ray.actor import ActorHandle

LOOK_S = 0.2


def this_actor() -> "list[ActorHandle[Any]]":
    """The current process's own actor, in a list: Ray would await a bare handle. Empty where there is none."""
    context = ray.get_runtime_context()
    return [context.current_actor] if context.get_actor_id() else []


async def until_dead(actor: "ActorHandle[Any]") -> None:
    """Return when `actor` is dead. One that is merely out of reach for a while may live."""
    while True:
        try:
            await actor.__ray_ready__.remote()
        except ray.exceptions.ActorUnavailableError:
            pass
        except ray.exceptions.RayError:
            return
        await asyncio.sleep(LOOK_S)

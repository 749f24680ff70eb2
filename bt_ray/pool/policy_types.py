"""What `bt_ray.pool.policy` decides about: model servers, the leases that are asked for, and what servers are told to do."""

from collections import defaultdict
from dataclasses import dataclass, field
from enum import Enum

from bt_ray.weights import Weights


@dataclass(frozen=True)
class Policy:
    """How servers are shared out.

    Attributes:
        limit: Servers at most, beside those that are leaving.
        minimum: Servers that are never released.
        turn_s: Seconds that a server stays with its shared leases while others wait.
        patience_s: Seconds that a lease waits for growth before a worse server than a new one is taken for it.
        idle_timeout_s: Seconds after which an idle server above the minimum is released.
        stays_up: Whether a server keeps its model during a training.
        adapters: LoRA adapters that a server serves at once, beside their base; 0 where it serves one version.
    """

    limit: int
    minimum: int = 1
    turn_s: float = 60.0
    patience_s: float = 30.0
    idle_timeout_s: float = 300.0
    stays_up: bool = True
    adapters: int = 0


@dataclass(frozen=True)
class Ask:
    """A lease that is wanted.

    Attributes:
        lease: Its number; a later ask has a higher one.
        holder: Who wants it.
        weights: What requests will ask for, or what a training starts from.
        exclusive: Whether it is for a training.
        since: When it was asked for, in seconds.
        urgency: How many steps, one after the other, begin with the one that it is for.
        goes_on: Whether its holder gives another lease back for it.
    """

    lease: int
    holder: str
    weights: Weights
    exclusive: bool
    since: float
    urgency: int = 0
    goes_on: bool = False

    @property
    def turn(self) -> tuple[int, bool, bool, int]:
        """Sorts asks: the longest way to go first, then who goes on, then trainings, then as they were asked for."""
        return (-self.urgency, not self.goes_on, not self.exclusive, self.lease)


class State(Enum):
    """What a server does, as far as leases go."""

    PLACING = "placing"
    READY = "ready"
    CHANGING = "changing"
    STOPPING = "stopping"


@dataclass
class Server:
    """A model server.

    Attributes:
        number: Never used for two servers.
        slots: The model whose own slot it is in; empty for the slots of all other models.
        state: What it does.
        serving: What it serves, or is going to serve, by id; empty when that is not known, or when it has no model.
        base: The base of the model in it, None when there is none.
        leases: The shared leases on it.
        granted: Those of them that were told so.
        training: The exclusive lease on it.
        incarnation: Counts how often it came to serve something, so that news of an earlier time can be told.
        since: When it came to these weights, or in state PLACING when it was asked for, in seconds.
        idle_since: When its last lease ended.
        leaving: Whether its node is going away: it gets no further lease, and ends with its last.
        node: Where it is, once it is placed.
        fetching: The weights that are being copied to its node, ahead of their use.
        fetches: Whether that is done; not any more once it failed.
    """

    number: int
    slots: str = ""
    state: State = State.PLACING
    serving: dict[str, Weights] = field(default_factory=dict)
    base: str | None = None
    leases: dict[int, Ask] = field(default_factory=dict)
    granted: set[int] = field(default_factory=set)
    training: Ask | None = None
    incarnation: int = 0
    since: float = 0.0
    idle_since: float = 0.0
    leaving: bool = False
    node: str = ""
    fetching: Weights | None = None
    fetches: bool = True

    @property
    def empty(self) -> bool:
        return self.state is State.READY and not self.leases and self.training is None

    @property
    def free(self) -> bool:
        return self.empty and not self.leaving

    @property
    def is_up(self) -> bool:
        return self.state is State.READY and self.base is not None

    @property
    def work(self) -> list[int]:
        """All leases on it."""
        return [*self.leases, *([self.training.lease] if self.training is not None else [])]

    def serves(self, weights: Weights) -> bool:
        return weights.id in self.serving

    def drop_leases(self) -> list[Ask]:
        dropped = list(self.leases.values())
        self.leases.clear()
        self.granted.clear()
        return dropped


@dataclass(frozen=True)
class Grow:
    """Create the server of this number, and tell `placed` when it can be used."""

    server: int


@dataclass(frozen=True)
class Serve:
    """Bring a server to these weights, and those beside them: a start, a swap or a relaunch. Tell `served` or `failed`."""

    server: int
    weights: Weights
    beside: tuple[Weights, ...] = ()


@dataclass(frozen=True)
class Fetch:
    """Copy weights to a server's node, ahead of their use there. Tell `fetched`."""

    server: int
    weights: Weights


@dataclass(frozen=True)
class Grant:
    """Tell who asked that the lease begins."""

    lease: Ask
    server: int


@dataclass(frozen=True)
class Revoke:
    """A shared lease has ended because others wait: its requests are refused from now on."""

    lease: Ask
    server: int


@dataclass(frozen=True)
class Stop:
    """End what a dead holder left running on a server. Tell `stopped`."""

    server: int


@dataclass(frozen=True)
class Release:
    """End a server: it is idle and not needed, or its node is going away."""

    server: int
    leaving: bool = False


Action = Grow | Serve | Fetch | Grant | Revoke | Stop | Release


class Copies:
    """Which fine-tunes a node is known to have on its disk. A hint: a copy may have made room for others."""

    def __init__(self) -> None:
        self._on: defaultdict[str, set[str]] = defaultdict(set)

    def add(self, node: str, *weights: Weights) -> None:
        self._on[node].update(each.id for each in weights if each.parent is not None)

    def drop(self, node: str, *weights: Weights) -> None:
        """Forget copies, so that what failed with them on this node is tried elsewhere."""
        self._on[node].difference_update(each.id for each in weights)

    def has(self, node: str, weights: Weights) -> bool:
        """True of base models, which are nobody's to copy."""
        return weights.parent is None or weights.id in self._on.get(node, ())

"""The values of `bt_ray.pool.policy`: model servers, requested leases, and the actions that it decides on."""

from collections import defaultdict
from dataclasses import dataclass, field
from enum import Enum

from bt_ray.weights import Weights


@dataclass(frozen=True)
class Policy:
    """How servers are shared.

    Attributes:
        limit: Maximum number of servers, not counting those that are leaving.
        minimum: Number of servers that are never released.
        turn_s: Seconds that shared leases keep a server while others wait.
        patience_s: Seconds that a lease waits for a new server before it gets one that fits less well.
        idle_timeout_s: Seconds after which an idle server above the minimum is released.
        stays_up: Whether a server keeps its model during a training.
        adapters: Maximum number of LoRA adapters that a server serves beside their base; 0 if it serves one version.
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
    """A request for a lease.

    Attributes:
        lease: Its number, higher for each later request.
        holder: The trial that requests it.
        weights: The weights that will be served, or that a training starts from.
        exclusive: Whether it is for a training.
        since: Time of the request, in seconds.
        urgency: Length of the longest chain of steps that begins with the step it is for.
        goes_on: Whether the holder returns another lease for it.
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
        """Sort key: the most urgent first, then holders that return another lease, then trainings, then the oldest."""
        return (-self.urgency, not self.goes_on, not self.exclusive, self.lease)


class State(Enum):
    """What a server does, from the point of view of leases."""

    PLACING = "placing"
    READY = "ready"
    CHANGING = "changing"
    STOPPING = "stopping"


@dataclass
class Server:
    """A model server.

    Attributes:
        number: Never used for two servers.
        slots: The model that its slot is reserved for; empty for slots that serve all other models.
        state: What it does.
        serving: The weights that it serves or is about to serve, by id; empty if unknown, or without a model.
        base: The base of its model; None without a model.
        leases: The shared leases on it.
        granted: The shared leases whose holders have been told.
        training: The exclusive lease on it.
        incarnation: Counts its changes of weights, so that outdated messages are recognized.
        since: Time in seconds when it got these weights; in state PLACING, when it was requested.
        idle_since: Time when its last lease ended.
        leaving: Whether its node is going away. It gets no further lease, and ends with its last one.
        node: Its node, once it is placed.
        fetching: The weights that are being copied to its node ahead of their use.
        fetches: Whether weights are copied ahead; false after a copy has failed.
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

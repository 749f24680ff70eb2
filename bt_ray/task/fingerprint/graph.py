"""Objects as a graph of nodes, each visited once, and a hash for each node that says what it is and not where it lies.

A node's hash is made of its label and of its children's hashes, so equal objects have equal hashes, shared or not. Nodes
that reach each other are hashed together: in rounds, each by what it reaches, until a round tells no more of them apart.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

ROUNDS = 16
"""Within a knot of nodes that reach each other: a difference counts wherever it is, its place as far as so many steps."""


class Mode(Enum):
    """How an object is read."""

    PLAIN = auto()
    KEYWORDS = auto()
    """As arguments by name: the order of a dict's keys means nothing."""
    TYPE = auto()
    """As a type in a signature, whose documentation is in prompts."""
    TOOL = auto()
    """As tools, whose documentation is in prompts."""


class ByValue:
    """A thing of our own that is the same thing wherever it is equal."""


@dataclass(frozen=True, slots=True, eq=False)
class Ref:
    """An object that a node refers to."""

    value: Any
    mode: Mode = Mode.PLAIN


@dataclass(slots=True, eq=False)
class Node:
    """What an object is made of.

    Attributes:
        label: All of the node but its children.
        children: Objects, further nodes, and texts.
        unordered: Whether the order of the children means nothing.
        name: What a user calls it; `""` for what is told as a part of something else.
        documentation: What its documentation says, which counts where something reads that.
        source: Gives its source as it is written, likewise.
        reads_documentation: Whether it reads documentation of functions.
        reads_source: Whether it reads source.
        named: Further children by what a user calls them; their hashes are no part of the node's.
    """

    label: str
    children: list[Any] = field(default_factory=list)
    unordered: bool = False
    name: str = ""
    documentation: str = ""
    source: Callable[[], str] | None = None
    reads_documentation: bool = False
    reads_source: bool = False
    named: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reached:
    """What a root reaches.

    Attributes:
        digest: The root's hash.
        named: A hash for each thing below it that has a name.
        source: A hash of the source of all of it, as it is written; `""` where nothing reads that.
    """

    digest: str
    named: dict[str, str]
    source: str = ""


def text_hash(*texts: str) -> str:
    """A hash of texts in their order, 32 hex digits."""
    hashed = hashlib.blake2b(digest_size=16)
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        hashed.update(len(data).to_bytes(8, "big"))
        hashed.update(data)
    return hashed.hexdigest()


def find_knots(root: int, below: Callable[[int], Iterator[int]]) -> Iterator[list[int]]:
    """What `root` reaches, in groups whose members reach each other, each group after those that it reaches.

    Tarjan, "Depth-first search and linear graph algorithms", 1972, without recursion.
    """
    order = {root: 0}
    lowest = {root: 0}
    stack, on_stack = [root], {root}
    work = [(root, below(root))]
    while work:
        number, children = work[-1]
        child = next(children, None)
        if child is None:
            work.pop()
            if work:
                above = work[-1][0]
                lowest[above] = min(lowest[above], lowest[number])
            if lowest[number] == order[number]:
                at = len(stack) - 1
                while stack[at] != number:
                    at -= 1
                knot = stack[at:]
                del stack[at:]
                on_stack.difference_update(knot)
                yield knot
        elif child not in order:
            order[child] = lowest[child] = len(order)
            stack.append(child)
            on_stack.add(child)
            work.append((child, below(child)))
        elif child in on_stack:
            lowest[number] = min(lowest[number], order[child])


class Graph:
    """The nodes of all objects that were seen.

    Args:
        leaf: The text of an object without parts; None if it has some.
        expand: What an object with parts is made of.
    """

    def __init__(self, leaf: Callable[[Any], str | None], expand: Callable[[Any, Mode], Node]) -> None:
        self._leaf = leaf
        self._expand = expand
        self._nodes: list[Node] = []
        self._hashes: list[str] = []
        self._known: dict[tuple[Any, Mode], int] = {}
        self._kept: list[Any] = []
        """Every object that has a node: its id must not become another's."""
        self._to_expand: list[tuple[int, Any, Mode]] = []

    def reach(self, value: Any, mode: Mode = Mode.PLAIN) -> Reached:
        """The hash of an object, and of what has a name in it."""
        root = self._child(Ref(value, mode))
        while self._to_expand:
            number, seen, how = self._to_expand.pop()
            self._place(number, self._expand(seen, how))
        if isinstance(root, str):
            return Reached(text_hash(root), {})
        if not self._hashes[root]:
            for knot in find_knots(root, self._iterate_unhashed):
                self._hash(knot)
        return self._collect(root)

    def _child(self, child: Any) -> str | int:
        """A child as it is kept: a text, or the number of a node."""
        if isinstance(child, str):
            return f"text:{child}"
        if isinstance(child, Node):
            number = self._new()
            self._place(number, child)
            return number
        leaf = self._leaf(child.value)
        if leaf is not None:
            return leaf
        key = (child.value if isinstance(child.value, ByValue) else id(child.value), child.mode)
        if key not in self._known:
            self._known[key] = self._new()
            self._kept.append(child.value)
            self._to_expand.append((self._known[key], child.value, child.mode))
        return self._known[key]

    def _new(self) -> int:
        self._nodes.append(Node(""))
        self._hashes.append("")
        return len(self._nodes) - 1

    def _place(self, number: int, node: Node) -> None:
        node.children = [self._child(child) for child in node.children]
        node.named = {name: self._child(child) for name, child in node.named.items()}
        self._nodes[number] = node

    def _below(self, number: int) -> Iterable[int]:
        node = self._nodes[number]
        yield from (child for child in node.children if isinstance(child, int))
        yield from (child for child in node.named.values() if isinstance(child, int))

    def _iterate_unhashed(self, number: int) -> Iterator[int]:
        return (child for child in self._below(number) if not self._hashes[child])

    def _hash(self, knot: list[int]) -> None:
        among = dict.fromkeys(knot, "")
        if len(knot) == 1 and knot[0] not in self._below(knot[0]):
            self._hashes[knot[0]] = self._hash_of(knot[0], among)
            return
        told_apart = 0
        for _ in range(ROUNDS):
            among = {number: self._hash_of(number, among) for number in knot}
            if len(set(among.values())) == told_apart:
                break
            told_apart = len(set(among.values()))
        whole = text_hash(*sorted(set(among.values())))
        for number in knot:
            self._hashes[number] = text_hash("knot", among[number], whole)

    def _hash_of(self, number: int, among: dict[int, str]) -> str:
        node = self._nodes[number]
        texts = [
            child if isinstance(child, str) else f"node:{among[child] if child in among else self._hashes[child]}"
            for child in node.children
        ]
        return text_hash(node.label, *(sorted(texts) if node.unordered else texts))

    def _own(self, node: Node) -> str:
        """A hash of a node without the objects that it refers to."""
        return text_hash(node.label, *sorted(child for child in node.children if isinstance(child, str)))

    def _collect(self, root: int) -> Reached:
        seen, to_see = {root}, [root]
        while to_see:
            for child in self._below(to_see.pop()):
                if child not in seen:
                    seen.add(child)
                    to_see.append(child)
        nodes = [self._nodes[number] for number in seen]
        named: dict[str, set[str]] = {}
        for node in nodes:
            if node.name:
                named.setdefault(node.name, set()).add(self._own(node))
            for name, child in node.named.items():
                named.setdefault(name, set()).add(child if isinstance(child, str) else self._hashes[child])
        read, source = set(), ""
        if any(node.reads_documentation or node.reads_source for node in nodes):
            read = {text_hash(node.name, node.documentation) for node in nodes if node.documentation}
        if any(node.reads_source for node in nodes):
            source = text_hash(*sorted(text_hash(node.name, node.source()) for node in nodes if node.source is not None))
        hashes = {name: text_hash(*sorted(own))[:8] for name, own in named.items()}
        return Reached(text_hash(self._hashes[root], *sorted(read)), hashes, source)

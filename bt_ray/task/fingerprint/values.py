"""What a value is to a key: all that it holds. Any object goes in; what nothing sees through counts by its class."""

import collections
import copyreg
import enum
import functools
import hashlib
import os
import random
import sys
import types
import weakref
from collections.abc import Mapping
from functools import cache
from pathlib import PurePath
from typing import Any

import dspy
import pydantic
from pydantic.fields import FieldInfo

from bt_ray.task.fingerprint import functions
from bt_ray.task.fingerprint import types as kinds
from bt_ray.task.fingerprint.code import own_attribute
from bt_ray.task.fingerprint.functions import Package, SourceFile, SourceFolder, pairs
from bt_ray.task.fingerprint.graph import Graph, Mode, Node, Reached, Ref, text_hash
from bt_ray.task.fingerprint.secrets import is_of_a_client, is_secret

OWN_KEY = "__bt_ray_key__"
"""Of an object that says what it is to a key: a value, or a method that returns one."""
OF_A_RUN = {"history", "_compiled", "traces", "train", "stage"}
"""Attributes of DSPy modules that say what happened to them, not what they do."""
OF_ITS_SPEED = {"num_threads"}
"""Attributes of DSPy's own objects that change no result."""
OF_AN_LMS_RUN = {"history", "_engine_lock", "_engine_store", "_warned_zero_temp_rollout"}
BUILT_IN: tuple[Any, ...] = (str, bytes, int, float, list, tuple, set, frozenset, dict)
SIMPLE = (str, bool, int, float, type(None), dict)
"""Attributes of DSPy's objects that are told by their names if they change."""
METHODS = (types.BuiltinFunctionType, types.MethodWrapperType)
DESCRIPTORS = (
    types.MethodDescriptorType, types.ClassMethodDescriptorType, types.WrapperDescriptorType, types.GetSetDescriptorType,
    types.MemberDescriptorType,
)  # fmt: skip
WEAK = (weakref.WeakKeyDictionary, weakref.WeakValueDictionary, weakref.WeakSet)


class Values:
    """Reads values. Each object is read once.

    Args:
        places: Folders that mean the same wherever they are, by what stands for them.
    """

    def __init__(self, places: Mapping[str, str] | None = None) -> None:
        self.places = dict(places or {})
        self._graph = Graph(self._leaf, self._expand)

    def read(self, value: Any, mode: Mode = Mode.PLAIN) -> Reached:
        """What a value is, and what it reaches."""
        return self._graph.reach(value, mode)

    def _leaf(self, value: Any) -> str | None:
        kind = type(value)
        if kind is str:
            return f"str {self._replace_places(value)}"
        if value is None or kind is bool or kind is float:
            return f"{kind.__name__} {value!r}"
        if kind is int:
            return f"int {value:x}"
        if kind is bytes:
            return f"bytes {value.hex()}"
        return None

    def _replace_places(self, text: str) -> str:
        for place, stands_for in self.places.items():
            if place in text:
                text = text.replace(place, stands_for)
        return text

    def _expand(self, value: Any, mode: Mode) -> Node:
        try:
            own = _own_key(value)
            if own is not None:
                return Node(f"own key of {type(value).__name__}", [Ref(own[0])])
            return self._read(value, mode)
        except Exception as error:  # whatever a user's object does when it is looked at
            try:
                held = [_read_attributes(object.__getattribute__(value, "__dict__"), installed=True)]
            except Exception:
                held = []
            return Node(f"unseen {type(error).__name__}", [] if isinstance(value, type) else [Ref(type(value)), *held])

    def _read(self, value: Any, mode: Mode) -> Node:
        kind: Any = type(value)
        reader = _reader(kind)
        if reader is not None:
            node: Node = reader(value, mode)
        elif isinstance(value, PurePath):
            node = Node(f"path {self._replace_places(str(value))}")
        elif kinds.is_type_expression(value):
            node = kinds.expand_type(value, mode)
        elif not is_installed_value(kind) or kinds.of_a_library(kind):
            node = _object(value, mode)
        else:
            node = _read_installed_object(value, mode)
        return node


def is_installed_value(kind: type) -> bool:
    return kinds.is_installed_class(kind) if kind.__module__ != "builtins" else True


def is_users_object(value: Any) -> bool:
    """Whether a value is of a class of the user's or of DSPy's, and does not say itself what it is to a key."""
    kind = type(value)
    return (not is_installed_value(kind) or kinds.of_a_library(kind)) and _own_key(value) is None


def _read_installed_object(value: Any, mode: Mode) -> Node:
    if hasattr(type(value), "__array__"):
        return _array(value)
    return _read_mapping(value, mode) if isinstance(value, Mapping) else _read_reduced_state(value)


def _own_key(value: Any) -> tuple[Any] | None:
    """What an object says of itself, in a tuple; None if it says nothing."""
    own = getattr(value, "__dict__", {})
    if OWN_KEY in own and not callable(own[OWN_KEY]):
        return (own[OWN_KEY],)
    if isinstance(value, type):
        return None
    for kind in type(value).__mro__:
        if OWN_KEY in vars(kind):
            found = vars(kind)[OWN_KEY]
            return (found.__get__(value, type(value))() if callable(found) else found,)
    return None


def _set(value: Any, mode: Mode) -> Node:
    return Node("set", [Ref(item) for item in value], unordered=True)


def _read_mapping(value: Mapping[Any, Any], mode: Mode) -> Node:
    """A dict, in its order unless that means nothing; a default that it makes counts too."""
    items = [Node("item", [Ref(key), Ref(item, mode)]) for key, item in value.items()]
    node = Node("mapping", items, unordered=mode is Mode.KEYWORDS)
    if isinstance(value, dict) and type(value) is not dict:
        factory = Ref(getattr(value, "default_factory", None), mode)
        return Node("mapping of a kind", [Ref(type(value)), factory, node])
    return node


def _object(value: Any, mode: Mode) -> Node:
    """An object by its class and its attributes."""
    kind = type(value)
    installed = is_installed_value(kind)
    values = _attributes(value)
    if isinstance(value, dspy.Module):
        values = {name: item for name, item in values.items() if name not in OF_A_RUN}
    if kinds.of_a_library(kind):
        values = {name: item for name, item in values.items() if name not in OF_ITS_SPEED}
    children: list[Any] = [Ref(kind), _read_attributes(values, installed=installed)]
    for base in BUILT_IN:
        if isinstance(value, base):
            children.append(Ref(base(value), mode))
            break
    if not installed:
        children += functions.find_named_files(
            values.values(), own_attribute(sys.modules.get(kind.__module__), "__file__") or ""
        )
    named = {}
    if any(kinds.of_a_library(base) for base in kind.__mro__):
        simple = {name: item for name, item in values.items() if isinstance(item, SIMPLE) and not is_secret(name, item)}
        named = {f"setting {name} of {kind.__name__}": Ref(item, _mode_of(name, installed)) for name, item in simple.items()}
    return Node("object", children, reads_source=isinstance(value, dspy.CodeAct), named=named)


def _attributes(value: Any) -> dict[str, Any]:
    found = dict(getattr(value, "__dict__", {}))
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            own = f"_{kind.__name__.lstrip('_')}{name}" if name.startswith("__") and not name.endswith("__") else name
            if name not in ("__dict__", "__weakref__") and hasattr(value, own):
                found[own] = getattr(value, own)
    return found


def _read_attributes(values: Mapping[str, Any], *, installed: bool) -> Node:
    shown = {name: Ref(item, _mode_of(name, installed)) for name, item in values.items() if not is_secret(name, item)}
    return pairs({str(name): ref for name, ref in shown.items()})


def _mode_of(name: Any, installed: bool) -> Mode:
    """How the value of an attribute is read, by the attribute's name."""
    text = str(name)
    if "tool" in text:
        return Mode.TOOL
    return (
        Mode.KEYWORDS
        if installed and text.endswith(("args", "config", "settings", "options", "params", "adapter"))
        else Mode.PLAIN
    )


def _read_reduced_state(value: Any) -> Node:
    """An object of an installed package by the state that it would be pickled with, else by its attributes."""
    kind = type(value)
    if isinstance(value, WEAK):
        return Node("weak", [Ref(kind)])
    if value is getattr(sys.modules.get("numpy.random.mtrand"), "_rand", None):
        return Node("random generator of numpy")
    try:
        reduce = copyreg.dispatch_table.get(kind)
        state = reduce(value) if reduce else value.__reduce_ex__(4)
    except Exception:  # locks, connections and the like
        return Node("object", [Ref(kind), _read_attributes(_attributes(value), installed=True)])
    if isinstance(state, str):
        return Node(f"global {state}", [Ref(kind), _read_attributes(_attributes(value), installed=True)])
    made_by, arguments, *more = state
    attributes, items, pairs_of_it = (*more, None, None, None)[:3]
    children: list[Any] = [Ref(made_by), *(Ref(argument) for argument in arguments)]
    parts = attributes if isinstance(attributes, tuple) else (attributes,)
    children += [_read_attributes(part, installed=True) if isinstance(part, dict) else Ref(part) for part in parts]
    children += [Node("items", [Ref(item) for item in items or ()])]
    children += [Node("pairs", [Ref(part) for pair in pairs_of_it or () for part in pair])]
    return Node("reduced", children)


def _array(value: Any) -> Node:
    """Numbers by their bytes, tables by their columns."""
    import numpy as np

    kind = type(value)
    if hasattr(value, "iloc") or hasattr(value, "get_indexer"):
        return _labelled_array(value)
    if hasattr(value, "detach"):
        return _tensor(value)
    if not isinstance(value, np.ndarray | np.generic):
        shown = f"array {getattr(value, 'dtype', '')}"
        return Node(shown, [Ref(kind), Ref(np.asarray(value)), _read_reduced_state(value)])
    if own := getattr(value, "__dict__", None):
        return Node("array of a kind", [Ref(kind), Ref(np.array(value)), _read_attributes(own, installed=True)])
    array = np.asarray(value)
    if array.dtype.hasobject:
        return Node(f"array {array.shape}", [Ref(array.tolist())])
    data = np.ascontiguousarray(array).tobytes().hex() if array.nbytes < 4096 else _bytes_hash(np.ascontiguousarray(array))
    return Node(f"array {kind.__name__} {array.dtype.descr} {array.shape} {data}")


def _labelled_array(value: Any) -> Node:
    """Tables of pandas, their columns and their indexes."""
    import numpy as np

    kind = type(value)
    if hasattr(value, "columns"):
        columns = [Node("column", [Ref(name), Ref(value.iloc[:, n])]) for n, name in enumerate(value.columns)]
        return Node("table", [Ref(kind), Ref(value.index), Ref(list(value.columns.names)), Ref(value.attrs), *columns])
    if hasattr(value, "iloc"):
        children = [Ref(kind), Ref(value.name), Ref(value.index), Ref(value.attrs), Ref(np.asarray(value))]
        return Node(f"column {value.dtype}", children)
    return Node(f"index {value.dtype}", [Ref(kind), Ref(list(value.names)), Ref(np.asarray(value))])


def _tensor(value: Any) -> Node:
    """A tensor of torch by its bytes: numpy does not know all types of its numbers."""
    torch = sys.modules["torch"]  # whoever has a tensor has imported it

    flat = value.detach().cpu().contiguous().reshape(-1)
    shown = f"tensor {value.dtype} {tuple(value.shape)} {value.requires_grad}"
    return Node(shown, [Ref(type(value)), Ref(flat.view(torch.uint8).numpy())])


def _random(value: random.Random, mode: Mode) -> Node:
    """A generator by its state; that of Python's own functions is another in each process."""
    if value is getattr(random, "_inst", None):
        return Node("random generator of Python")
    return Node("random", [Ref(type(value)), text_hash(repr(value.getstate()))])


def _bytes_hash(array: Any) -> str:
    return hashlib.blake2b(array.tobytes(), digest_size=16).hexdigest()


def _example(example: dspy.Example, mode: Mode) -> Node:
    """An example by its fields, in whatever order, and by which of them are inputs."""
    inputs = example._input_keys
    more = {name: item for name, item in vars(example).items() if name not in ("_store", "_demos", "_input_keys")}
    fields = pairs({str(name): Ref(item) for name, item in example._store.items()})
    return Node(
        f"example {None if inputs is None else sorted(map(str, inputs))}",
        [Ref(type(example)), fields, pairs({name: Ref(item) for name, item in more.items()})],
    )


def _lm(lm: dspy.BaseLM, mode: Mode) -> Node:
    """An LM by its class and all its parameters but secrets and addresses."""
    values = {name: item for name, item in _attributes(lm).items() if name not in OF_AN_LMS_RUN and not is_of_a_client(name)}
    arguments = values.get("kwargs")
    settings = {name: item for name, item in arguments.items() if not is_of_a_client(name)} if arguments else {}
    named = {f"setting {name} of the LM {values.get('model')}": Ref(item, Mode.KEYWORDS) for name, item in settings.items()}
    return Node("lm", [Ref(type(lm)), pairs({name: _read_setting(item) for name, item in values.items()})], named=named)


def _read_setting(value: Any) -> Any:
    """A parameter of a client: what lets it in, and where it is, is left out of whatever dicts there are."""
    if type(value) is dict:
        return pairs({repr(name): _read_setting(item) for name, item in value.items() if not is_of_a_client(name)})
    if type(value).__module__ == "bt_ray.trial.lm":  # who serves the weights that `model` names
        return Node("served")
    return Ref(value, Mode.KEYWORDS)


def _embedder(value: Any, mode: Mode) -> Node:
    return Node("embedder", [Ref(type(value)), pairs({name: _read_setting(item) for name, item in vars(value).items()})])


def _model_instance(value: pydantic.BaseModel, mode: Mode) -> Node:
    own = [getattr(value, "__pydantic_extra__", None), getattr(value, "__pydantic_private__", None)]
    values = {**vars(value), **(own[0] or {}), **(own[1] or {})}
    return Node("model", [Ref(type(value)), _read_attributes(values, installed=False)])


def _read_bound_method(value: Any, mode: Mode) -> Node:
    """A method of an object, or a function that is built in."""
    holder = getattr(value, "__self__", None)
    if holder is None or isinstance(holder, types.ModuleType):
        module = value.__module__ or getattr(holder, "__name__", "builtins")
        return Node(f"built in {module}.{value.__qualname__}", [Ref(functions.package_of(module))])
    return Node(f"method {value.__name__}", [Ref(holder)])


READERS: dict[Any, Any] = {
    Package: lambda value, mode: functions.expand_package(value),
    SourceFile: lambda value, mode: functions.expand_source_file(value),
    SourceFolder: lambda value, mode: functions.expand_source_folder(value),
    dspy.BaseLM: _lm,
    dspy.Embedder: _embedder,
    dspy.Example: _example,
    FieldInfo: lambda value, mode: kinds.expand_field(value),
    enum.Enum: lambda value, mode: Node(f"member {value._name_}", [Ref(value._value_), Ref(type(value))]),
    types.FunctionType: functions.expand_function,
    types.MethodType: lambda value, mode: Node("method", [Ref(value.__self__), Ref(value.__func__, mode)]),
    METHODS: _read_bound_method,
    DESCRIPTORS: lambda value, mode: Node(f"descriptor {value.__name__}", [Ref(value.__objclass__)]),
    types.GenericAlias: kinds.expand_type,
    type: kinds.expand_class,
    types.ModuleType: lambda value, mode: functions.expand_module(value),
    types.CodeType: lambda value, mode: functions.expand_code(value),
    random.Random: _random,
    property: lambda value, mode: Node("property", [Ref(value.fget), Ref(value.fset), Ref(value.fdel)]),
    staticmethod | classmethod: lambda value, mode: Node(type(value).__name__, [Ref(value.__func__)]),
    functools.partial: lambda value, mode: Node(
        "partial",
        [Ref(type(value)), Ref(value.func, mode), Ref(value.args), Ref(dict(value.keywords), Mode.KEYWORDS)],
    ),
    functools.cached_property: lambda value, mode: Node("cached property", [Ref(value.func)]),
    weakref.ref: lambda value, mode: Node("weak", [Ref(value())]),
    types.GeneratorType: lambda value, mode: Node("generator", [Ref(value.gi_code)]),
    types.AsyncGeneratorType: lambda value, mode: Node("generator", [Ref(value.ag_code)]),
    types.CoroutineType: lambda value, mode: Node("coroutine", [Ref(value.cr_code)]),
    bytearray | memoryview: lambda value, mode: Node("bytes", [Ref(bytes(value))]),
    type({}.keys()) | type({}.values()) | type({}.items()): lambda value, mode: Node("view", [Ref(list(value))]),
    collections.OrderedDict: _read_mapping,
    pydantic.BaseModel: _model_instance,
    type(os.environ): lambda value, mode: Node("environment"),
}
"""How each kind of object is read; the first that fits."""


EXACTLY: dict[type, Any] = {
    dict: _read_mapping,
    list: lambda value, mode: Node("list", [Ref(item, mode) for item in value]),
    tuple: lambda value, mode: Node("tuple", [Ref(item, mode) for item in value]),
    set: _set,
    frozenset: _set,
}
"""How an object of exactly this kind is read: those of classes that are made of them have more."""


@cache
def _reader(kind: type) -> Any:
    return EXACTLY.get(kind) or next((read for fitting, read in READERS.items() if issubclass(kind, fitting)), None)

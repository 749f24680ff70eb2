"""What a class or a type is to a key: its members, its fields, and, where it is in prompts, its documentation."""

import enum
import inspect
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import dspy
import pydantic
from pydantic.fields import FieldInfo

from bt_ray.task.fingerprint.code import is_installed, is_users_function, is_users_module, own_attribute
from bt_ray.task.fingerprint.functions import find_named_files, package_of, pairs, read_text_annotation
from bt_ray.task.fingerprint.graph import Mode, Node, Ref

LIBRARIES = ("bt_ray", "dspy", "gepa")
"""Packages whose objects are taken by their attributes, although their code is taken by name."""
NOT_OF_A_CLASS = {
    "__annotate__", "__annotations__", "__dict__", "__doc__", "__firstlineno__", "__module__", "__orig_bases__",
    "__qualname__", "__signature__", "__slotnames__", "__slots__", "__static_attributes__", "__weakref__", "_member_map_",
    "_value2member_map_",
}  # fmt: skip
OF_PYTHON = (types.GetSetDescriptorType, types.MemberDescriptorType, types.WrapperDescriptorType)
MADE_AT_RUN_TIME = 1 << 9
"""The flag of classes that no C code declares."""
NOT_OF_A_FIELD = {"annotation", "evaluated", "json_schema_extra"}
DECORATORS = (
    "validators", "field_validators", "root_validators", "field_serializers", "model_serializers", "model_validators",
    "computed_fields",
)  # fmt: skip


def of_a_library(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in LIBRARIES


def is_installed_class(kind: type) -> bool:
    """Whether a class is one that Python or an installed package names; what they make on demand has no name there."""
    module = sys.modules.get(kind.__module__)
    if kind.__module__ == "__main__":  # a function that was sent brings its classes into another one
        return False
    if module is None or is_users_module(module):
        file = own_attribute(module, "__file__")
        return isinstance(file, str) and is_installed(file)
    if kind.__module__ == "types" and getattr(types, kind.__qualname__, None) is not kind:  # made by `types.new_class`
        return not kind.__flags__ & MADE_AT_RUN_TIME
    found: Any = module
    for part in kind.__qualname__.split("."):
        found = getattr(found, "__dict__", {}).get(part)
        if found is None:
            return not _is_made_on_demand(kind)
    return found is kind or not _is_made_on_demand(kind)


def _is_made_on_demand(kind: type) -> bool:
    return issubclass(kind, pydantic.BaseModel | enum.Enum) or any(map(is_users_function, vars(kind).values()))


def expand_class(kind: type, mode: Mode) -> Node:
    if issubclass(kind, dspy.Signature):
        return _signature(kind)
    if is_installed_class(kind):
        return Node(f"class {kind.__module__}.{kind.__qualname__}", [Ref(package_of(kind.__module__)), *_patches(kind)])
    documented = mode is not Mode.PLAIN or issubclass(kind, pydantic.BaseModel)
    inner = Mode.TYPE if documented else Mode.PLAIN
    members = {name: Ref(member) for name, member in vars(kind).items() if _counts(name, member)}
    documentation = inspect.cleandoc(kind.__doc__) if documented and isinstance(kind.__doc__, str) else ""
    children: list[Any] = [Node("bases", [Ref(base, inner) for base in kind.__bases__]), pairs(members)]
    children.append(_annotations(kind, inner))
    if type(kind) is not type:
        children.append(Ref(type(kind)))
    if issubclass(kind, enum.Enum):
        values = [Node(name, [Ref(member._value_)]) for name, member in kind.__members__.items()]
        children = [*children[:1], Node("members", values), pairs(_without(members, kind.__members__)), *children[2:]]
    if issubclass(kind, pydantic.BaseModel):
        children += _model(kind)
    file = own_attribute(sys.modules.get(kind.__module__), "__file__") or kind.__module__
    children += find_named_files((ref.value for ref in members.values()), file)
    shown = file.rpartition("/")[2]
    return Node(
        f"class {kind.__qualname__} {documentation}",
        children,
        name=f"class {kind.__qualname__} in {shown}",
        documentation=(kind.__doc__ or "") if "__call__" in vars(kind) else "",  # its objects may be tools
    )


def _counts(name: str, member: Any) -> bool:
    """Whether a member of a class is written there, or stands for what is; others Python or a library made."""
    return name not in NOT_OF_A_CLASS and not name.startswith(("__pydantic", "_abc_")) and not isinstance(member, OF_PYTHON)


def _without(values: Mapping[str, Any], names: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def _patches(kind: type) -> Iterator[Any]:
    """Functions of the user's that were put into a class of a library."""
    for base in kind.__mro__:
        for name, member in vars(base).items():
            if is_users_function(member):
                yield Node(name, [Ref(member)])


def _annotations(kind: type, mode: Mode) -> Node:
    try:
        annotations = inspect.get_annotations(kind)
    except Exception:  # what is written there names what is not
        return Node("annotations")
    texts = " ".join(text for text in annotations.values() if isinstance(text, str))
    module = sys.modules.get(kind.__module__) if kind.__module__ != "__main__" else None
    variables = getattr(module, "__dict__", {})
    shown = [Node(name, [Ref(value, mode)]) for name, value in annotations.items()]
    return Node("annotations", [*shown, read_text_annotation(texts, variables)])


def _signature(signature: type[dspy.Signature]) -> Node:
    """A signature is its instruction and its fields, in their order."""
    functions = {name: Ref(member) for name, member in vars(signature).items() if isinstance(member, types.FunctionType)}
    label = f"signature {signature.__name__} {signature.instructions}"
    return Node(label, [*_model(signature), pairs(functions)], name=f"signature {signature.__name__}")


def _model(model: type[pydantic.BaseModel]) -> list[Any]:
    fields = [Node(name, [Ref(field, Mode.TYPE)]) for name, field in model.model_fields.items()]
    decorators = getattr(model, "__pydantic_decorators__", None)
    written = [
        Node(f"{group} {name}", [Ref(decorator.info), Ref(decorator.func)])
        for group in DECORATORS
        for name, decorator in getattr(decorators, group, {}).items()
    ]
    return [
        Node("fields", fields),
        Node("decorators", written),
        pairs({name: Ref(value) for name, value in model.model_config.items()}),
    ]


def expand_field(field: FieldInfo) -> Node:
    """A field of a pydantic model: its type, and all that its schema says."""
    names = [name for name in type(field).__slots__ if not name.startswith("_") and name not in NOT_OF_A_FIELD]
    values = {name: Ref(getattr(field, name)) for name in names if getattr(field, name, None) is not None}
    extra = Ref(field.json_schema_extra, Mode.KEYWORDS)
    return Node("field", [Ref(field.annotation, Mode.TYPE), extra, pairs(values)])


def is_type_expression(value: Any) -> bool:
    """Whether a value is a type that is made of others, as `list[str]` and `Item | None`."""
    named = (typing.TypeVar, typing.NewType, typing.ForwardRef, typing.ParamSpec)
    return typing.get_origin(value) is not None or isinstance(value, named)


def expand_type(value: Any, mode: Mode) -> Node:
    inner = Mode.TYPE if mode is Mode.TYPE else Mode.PLAIN
    if isinstance(value, typing.TypeVar | typing.ParamSpec):
        parts = [value.__bound__, *getattr(value, "__constraints__", ())]
        return Node(f"type variable {value.__name__}", [Ref(part, inner) for part in parts])
    if isinstance(value, typing.NewType):
        return Node(f"new type {value.__name__}", [Ref(value.__supertype__, inner)])
    if isinstance(value, typing.ForwardRef):
        return Node(f"type {value.__forward_arg__}")
    origin = typing.get_origin(value)
    shown = "Union" if origin is types.UnionType or origin is typing.Union else ""
    arguments = [Ref(part, inner) for part in typing.get_args(value)]
    return Node(f"type {shown}", [*([] if shown else [Ref(origin, inner)]), *arguments])

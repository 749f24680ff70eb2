"""What of a program would be lost, if it were rebuilt from what is kept of it: found by comparing the two.

What a program writes itself while it runs, as a cache or a counter, is no optimizer's work and is not compared.
"""

import dis
import inspect
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from functools import cache, partial
from numbers import Number
from pathlib import PurePath
from re import Pattern
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any
from uuid import UUID

import dspy
import pydantic
from dspy.predict.parameter import Parameter

from bt_ray.errors import TaskError
from bt_ray.task.fingerprint import OWN_KEY, digest, is_of_a_client, is_users_object

OF_A_RUN = {"_compiled", "callbacks", "history", "stage", "traces", "train"}
"""Attributes of DSPy's modules that say what happened to them, not what they do."""
OF_A_PREDICTOR = {"config", "demos", "fields", "lm", "signature"}
REPORTS = {
    "candidate_programs", "detailed_results", "flag_compilation_error_occurred", "mb_candidate_programs",
    "prompt_model_total_calls", "results_best", "results_latest", "score", "simba_idx", "total_calls", "trial_logs",
}  # fmt: skip
"""Attributes by which DSPy's optimizers tell of their work. No program reads them."""
OF_AN_LMS_RUN = {"callbacks", "history", "kwargs", "model"}
DATA = (
    BuiltinFunctionType, Decimal, Enum, Fraction, FunctionType, Number, Pattern, PurePath, UUID, bytes, date, dspy.BaseLM,
    dspy.Example, frozenset, partial, pydantic.BaseModel, range, set, str, time, timedelta, type,
)  # fmt: skip
"""What is compared by its content. Other objects of installed packages change while they work: their class is compared."""
SETTING = (bool, int, float, str, list, tuple, dict, type(None))
MUTABLE = (bytearray, deque, dict, list, set)
MUTATORS = {
    "add", "append", "appendleft", "clear", "discard", "extend", "insert", "pop", "popitem", "popleft", "remove", "reverse",
    "setdefault", "sort", "update",
}  # fmt: skip
MOST_NAMED = 8


class LostInKeeping(TaskError):
    """A program has what would not be kept of it."""

    def __init__(self, losses: Sequence[str]) -> None:
        self.losses = tuple(losses)
        super().__init__(f"What would not be kept of the program: {self.shown}.")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.losses,)

    @property
    def shown(self) -> str:
        more = len(self.losses) - MOST_NAMED
        return "; ".join(self.losses[:MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")


def refuse_losses(program: dspy.Module, rebuilt: dspy.Module) -> None:
    """Raises `LostInKeeping` if a program that was rebuilt from its state is not the program as it was."""
    losses = list(dict.fromkeys(_losses(program, rebuilt)))
    if losses:
        raise LostInKeeping(losses)


def refuse_other_parameters(program: dspy.Module, task_program: dspy.Module) -> None:
    if not isinstance(program, dspy.Module):
        raise LostInKeeping([f"its class ({type(program).__name__}, which is no dspy.Module)"])
    losses = []
    if type(program) is not type(task_program):
        losses.append(f"its class ({type(program).__name__}, the task's program is a {type(task_program).__name__})")
    ours, theirs = dict(program.named_parameters()), dict(task_program.named_parameters())
    losses += [f"predictor {name} (which was added)" for name in ours if name not in theirs]
    losses += [f"that predictor {name} is gone, or frozen" for name in theirs if name not in ours]
    if losses:
        raise LostInKeeping(losses)


def settings_of(lm: dspy.BaseLM) -> dict[str, Any]:
    """Its parameters that are values, without secrets and addresses."""
    attributes = {name: value for name, value in vars(lm).items() if not name.startswith("_") and name not in OF_AN_LMS_RUN}
    values = {**attributes, **lm.kwargs}
    return {n: value for n, value in values.items() if not is_of_a_client(n) and isinstance(value, SETTING)}


def differ(ours: Mapping[str, Any], theirs: Mapping[str, Any], name: str) -> bool:
    return (name in ours) != (name in theirs) or digest(ours.get(name)) != digest(theirs.get(name))


def is_json(value: Any) -> bool:
    """Whether JSON gives back just this value."""
    if isinstance(value, float):
        return type(value) is float and math.isfinite(value)
    if type(value) is int:
        return -(2**63) <= value < 2**64
    if type(value) is list:
        return all(map(is_json, value))
    if type(value) is dict:
        return all(type(name) is str and is_json(item) for name, item in value.items())
    return value is None or type(value) in (bool, str)


def _losses(program: dspy.Module, rebuilt: dspy.Module) -> Iterator[str]:
    """What the program has and the rebuilt one has not, or has otherwise."""
    kept = dict(rebuilt.named_predictors())
    for name, predictor in program.named_predictors():
        yield from _of_predictor(name, predictor, kept[name])
    yield from _of_value("", program, rebuilt, frozenset(), set())


def _of_predictor(name: str, was: dspy.Predict, kept: dspy.Predict) -> Iterator[str]:
    yield from _of_signature(name, was.signature, kept.signature)
    yield from _of_demos(name, was, kept)
    for key in sorted(was.config.keys() | kept.config.keys()):
        if differ(was.config, kept.config, key):
            yield f"config[{key!r}] of predictor {name}"
    if digest(was.fields) != digest(kept.fields):
        yield f"the decisions of predictor {name}"
    if was.lm is not kept.lm and digest(was.lm) != digest(kept.lm):
        yield from _of_lm(name, was.lm, kept.lm)


def _of_signature(name: str, was: Any, kept: Any) -> Iterator[str]:
    if was.instructions != kept.instructions:
        yield f"the instructions of predictor {name}"
    if list(was.fields) != list(kept.fields):
        yield f"the fields of predictor {name} ({', '.join(was.fields)}; the task's are {', '.join(kept.fields)})"
        return
    for field, info in was.fields.items():
        if digest(info) != digest(kept.fields[field]):
            yield f"the field {field!r} of predictor {name}: its type, or what it says besides prefix and description"


def _of_demos(name: str, was: dspy.Predict, kept: dspy.Predict) -> Iterator[str]:
    """Demos are the same if they read the same in a prompt: of a date, JSON holds what is shown of it."""
    if len(was.demos) != len(kept.demos):
        yield f"the demos of predictor {name}"
        return
    for number, (ours, theirs) in enumerate(zip(was.demos, kept.demos, strict=True)):
        if all(is_json(ours[field]) and ours[field] == theirs.get(field) for field in was.signature.fields if field in ours):
            continue
        if _as_prompted(was.signature, ours) != _as_prompted(was.signature, theirs):
            fields = [field for field in was.signature.fields if field in ours]
            shown = ", ".join(
                f"{field} ({type(ours[field]).__name__})"
                for field in fields
                if _as_prompted(was.signature, {field: ours[field]}) != _as_prompted(was.signature, {field: theirs[field]})
            )
            yield f"demo {number + 1} of predictor {name}{f': its {shown}' if shown else ''}"


def _as_prompted(signature: Any, demo: Mapping[str, Any]) -> list[Any]:
    """A demo as adapters show it; those that cannot show it are left out."""
    shown: list[Any] = []
    for adapter in (dspy.settings.adapter, dspy.ChatAdapter(), dspy.JSONAdapter()):
        try:
            if adapter is not None:
                user = adapter.format_user_message_content(signature, demo)
                shown += [user, adapter.format_assistant_message_content(signature, demo, missing_field_message="")]
        except Exception as error:
            shown.append(type(error).__name__)
    return shown


def _of_lm(name: str, was: Any, kept: Any) -> Iterator[str]:
    of = f"the LM of predictor {name}"
    if type(was) is not type(kept):
        yield f"{of}: its class ({type(was).__name__}, kept as {type(kept).__name__})"
        return
    if was.model != kept.model:
        yield f"{of}: its model ({was.model}, kept as {kept.model})"
    ours, theirs = settings_of(was), settings_of(kept)
    changed = [key for key in sorted(ours.keys() | theirs.keys()) if differ(ours, theirs, key)]
    if changed or was.model == kept.model:
        yield f"{of}: its {', '.join(changed) or 'settings'}"


def _of_value(path: str, was: Any, kept: Any, written: frozenset[str], seen: set[tuple[int, int]]) -> Iterator[str]:
    """What a value of the program has that its counterpart has not.

    Args:
        path: Where it is; `""` for the program.
        was: The value.
        kept: Its counterpart in the rebuilt program.
        written: Attributes that the program assigns itself while it runs.
        seen: The ids of what was compared.
    """
    if was is kept or (id(was), id(kept)) in seen:
        return
    seen.add((id(was), id(kept)))
    if type(was) is not type(kept):
        yield f"{path or 'its class'} ({type(was).__name__}, kept as {type(kept).__name__})"
    elif isinstance(was, Parameter) and not isinstance(was, dspy.Predict):
        if digest(was.dump_state()) != digest(kept.dump_state()):
            yield path
    elif isinstance(was, dspy.Module) or (is_users_object(was) and not isinstance(was, DATA)):
        yield from _of_attributes(path, was, kept, written, seen)
    elif isinstance(was, dict):
        yield from _of_items(path, was, kept, written, seen)
    elif isinstance(was, list | tuple | deque):
        yield from _of_items(path, dict(enumerate(was)), dict(enumerate(kept)), written, seen)
    elif isinstance(was, MethodType):
        yield from _of_value(path, was.__func__, kept.__func__, written, seen)
        yield from _of_value(path, was.__self__, kept.__self__, written, seen)
    elif _counts_by_content(was) and digest(was) != digest(kept):
        yield path


def _counts_by_content(value: Any) -> bool:
    return isinstance(value, DATA) or any(hasattr(value, name) for name in ("__array__", OWN_KEY))


def _of_items(
    path: str, was: Mapping[Any, Any], kept: Mapping[Any, Any], written: frozenset[str], seen: set[tuple[int, int]]
) -> Iterator[str]:
    if was.keys() != kept.keys():
        yield path
        return
    for key, value in was.items():
        yield from _of_value(f"{path}[{key!r}]", value, kept[key], written, seen)


def _of_attributes(path: str, was: Any, kept: Any, written: frozenset[str], seen: set[tuple[int, int]]) -> Iterator[str]:
    ours, theirs = _attributes(was), _attributes(kept)
    if isinstance(was, dspy.Module):
        left_out = OF_A_RUN | (OF_A_PREDICTOR if isinstance(was, dspy.Predict) else set())
        left_out |= REPORTS - theirs.keys() if not path else set()
        ours, theirs = ({n: v for n, v in values.items() if n not in left_out} for values in (ours, theirs))
    kind: type = type(was)
    assigned, changed = find_written_by_runs(kind)
    written |= assigned
    for name in (*ours, *(name for name in theirs if name not in ours)):
        inner = f"{path}.{name}" if path else name
        present = [values[name] for values in (ours, theirs) if name in values]
        if name in written or (name in changed and all(isinstance(value, MUTABLE) for value in present)):
            continue
        if name not in theirs:
            yield f"the attribute {inner} (which was added)"
        elif name not in ours:
            yield f"that the attribute {inner} is gone"
        else:
            found = list(_of_value(inner, ours[name], theirs[name], written, seen))
            yield from (f"the attribute {item}" if item.startswith(inner) else item for item in found)


def _attributes(value: Any) -> dict[str, Any]:
    return dict(getattr(value, "__dict__", {}))


@cache
def find_written_by_runs(kind: type) -> tuple[frozenset[str], frozenset[str]]:
    """Attributes that methods of a class assign, and those whose lists, dicts and sets they may change, while it works.

    Of a module those methods that a call reaches, of another class all but `__init__`.
    """
    methods = {
        name: code
        for base in reversed(kind.__mro__)
        if base not in (object, dspy.Module, dspy.Predict, *dspy.Module.__mro__)
        for name, member in vars(base).items()
        if (code := _code_of(member)) is not None
    }
    reached = ["forward", "aforward", "__call__", "acall"] if issubclass(kind, dspy.Module) else list(methods)
    assigned: set[str] = set()
    changed: set[str] = set()
    done = {"__init__", "__setstate__", "__deepcopy__"}
    while reached:
        name = reached.pop()
        if name in done or name not in methods:
            continue
        done.add(name)
        for code in _codes(methods[name]):
            operations = [(operation.opname, operation.argval) for operation in dis.get_instructions(code)]
            assigned |= {str(argument) for made, argument in operations if made in ("STORE_ATTR", "DELETE_ATTR")}
            names = set(code.co_names)
            if "setattr" in names:
                assigned |= {item for item in code.co_consts if isinstance(item, str)}
            if names & MUTATORS or {"STORE_SUBSCR", "DELETE_SUBSCR"} & {made for made, _ in operations}:
                changed |= names
            reached += names & methods.keys()
    return frozenset(assigned), frozenset(changed)


def _code_of(member: Any) -> CodeType | None:
    function = getattr(member, "fget", None) or getattr(member, "__func__", member)
    code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
    return code if isinstance(code, CodeType) else None


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for item in code.co_consts:
        if isinstance(item, CodeType):
            yield from _codes(item)

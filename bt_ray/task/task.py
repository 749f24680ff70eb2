"""The user's task: what to optimize, loaded from a Python function and checked before anything expensive starts."""

import hashlib
import importlib
import importlib.util
import inspect
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextvars import Context
from dataclasses import dataclass, field, replace
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import dspy
from dspy.teleprompt import GEPA, BootstrapFewShotWithRandomSearch, BootstrapFinetune
from dspy.teleprompt.bootstrap_finetune import FinetuneTeleprompter
from dspy.teleprompt.teleprompt import Teleprompter

from bt_ray.errors import TaskError, nearest
from bt_ray.task.metric import adapt_metric, make_synchronous


@dataclass(frozen=True)
class StepContext:
    """What a task's `optimizers` function is told about the step that it builds optimizers for.

    Attributes:
        prefix: The step's name: the strategy up to and including it, `"p -> w"`.
        seed: An integer of the step's own, the same whenever the step is run again.
        scratch_dir: A folder of the step's own, for an optimizer's logs (`GEPA(log_dir=str(ctx.scratch_dir))`).
        lm: The student's LM at this step: after `w`, the fine-tuned one. Also `dspy.settings.lm` during the call.
    """

    prefix: str
    seed: int
    scratch_dir: Path
    lm: dspy.LM


def step_seed(seed: int, prefix: str) -> int:
    """A seed of the step's own, the same whenever and wherever the step is run."""
    return zlib.crc32(f"{seed}:{prefix}".encode())


RESERVED_KEYS = ("self", "metric")
"""Arguments of `dspy.BetterTogether`, which takes optimizers as keywords beside them."""
OptimizersFunction = Callable[[StepContext], Mapping[str, Teleprompter]]


@dataclass(frozen=True)
class Task:
    """What to optimize. A task function `build() -> Task` makes it anew in each process.

    Attributes:
        program: The student. Predictors without an LM get the sweep's served model.
        trainset: Training examples, with their inputs marked.
        metric: `metric(example, prediction, trace=None)`, as for `dspy.BetterTogether`; a coroutine function is awaited.
        valset: Validation examples. Without it, `valset_ratio` of the trainset is held out.
        testset: Examples that no step sees; the best of each strategy is scored on them once, at the end.
        optimizers: Called anew for each step, inside `dspy.context(lm=<the step's LM>)`; gives what one would give to
            `BetterTogether(metric, **optimizers)`. Default: BetterTogether's own `p` and `w`.
        teacher: A program, or several, for the optimizers that take one. It needs LMs of its own, or none at all.
        optimizer_compile_args: Arguments of each optimizer's `compile()`, as for `BetterTogether.compile()`.
        version: Another one has every step computed anew: for what no key sees, as a service that the metric asks.
    """

    program: dspy.Module
    trainset: Sequence[dspy.Example]
    metric: Callable[..., Any]
    valset: Sequence[dspy.Example] | None = None
    testset: Sequence[dspy.Example] | None = None
    optimizers: OptimizersFunction | None = None
    teacher: dspy.Module | Sequence[dspy.Module] | None = None
    optimizer_compile_args: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    version: str | int | None = None

    def build_optimizers(self, context: StepContext) -> dict[str, Teleprompter]:
        """Fresh optimizers for one step. Optimizers keep state and take their LM when they are built.

        Raises:
            TaskError: The function did not return a dict of DSPy optimizers.
        """
        with dspy.context(lm=context.lm):
            built = self.optimizers(context) if self.optimizers is not None else self._default_optimizers()
        if not isinstance(built, Mapping) or not built:
            raise TaskError(f"optimizers(ctx) must return a dict of optimizers by key, it returned {built!r}.")
        for key, optimizer in built.items():
            _check_key(key)
            if not isinstance(optimizer, Teleprompter):
                raise TaskError(f"optimizers(ctx)[{key!r}] must be a DSPy optimizer, it is {optimizer!r}.")
            adapt_metric(optimizer)
        return dict(built)

    def _default_optimizers(self) -> dict[str, Teleprompter]:
        return {
            "p": BootstrapFewShotWithRandomSearch(metric=self.metric),
            "w": BootstrapFinetune(metric=self.metric),
        }

    def compile_args(self, optimizers: Mapping[str, Teleprompter]) -> dict[str, dict[str, Any]]:
        """`optimizer_compile_args`, with the task's teacher routed to every optimizer that takes one.

        `BootstrapFinetune` takes several teachers; the others take one, so several are given to it alone. GEPA has the
        argument but refuses it.
        """
        routed = {
            key: {name: value.deepcopy() if isinstance(value, dspy.Module) else value for name, value in arguments.items()}
            for key, arguments in self.optimizer_compile_args.items()
        }
        for key, optimizer in optimizers.items():
            arguments = routed.setdefault(key, {})
            if self.teachers and takes_teacher(optimizer) and "teacher" not in arguments:
                if isinstance(optimizer, FinetuneTeleprompter):
                    arguments["teacher"] = [teacher.deepcopy() for teacher in self.teachers]
                elif len(self.teachers) == 1:
                    arguments["teacher"] = self.teachers[0].deepcopy()
        return {key: arguments for key, arguments in routed.items() if arguments}

    def validation_examples(self, valset_ratio: float) -> list[dspy.Example]:
        """What programs are evaluated on: the valset, else the first of the trainset, as `dspy.BetterTogether` splits it."""
        return list(self.valset or list(self.trainset)[: int(valset_ratio * len(self.trainset))])

    @property
    def teachers(self) -> list[dspy.Module]:
        if self.teacher is None:
            return []
        return [self.teacher] if isinstance(self.teacher, dspy.Module) else list(self.teacher)


def takes_teacher(optimizer: Teleprompter) -> bool:
    return "teacher" in inspect.signature(optimizer.compile).parameters and not isinstance(optimizer, GEPA)


TaskFunction = Callable[..., Task]
"""What makes a task: `build()`."""


def task_spec(function: TaskFunction) -> str:
    """How a function is called in messages and manifests."""
    return f"{function.__module__}:{function.__qualname__}"


def load_task(source: str | TaskFunction, args: Mapping[str, Any] | None = None) -> Task:
    """Call the task function that `source` is or names, and check what it returns.

    Args:
        source: `"module:function"`, `"path/to/file.py:function"` (relative to the current directory), or the function.
        args: Arguments of the function, by name.

    Raises:
        TaskError: Nothing can be loaded, the function does not take `args`, or what it returns is no usable task.
    """
    spec = source if isinstance(source, str) else task_spec(source)
    # Outside of the context in which `bt_ray.served` works: what a file makes once would belong to its first call alone.
    function = Context().run(_import_task, source) if isinstance(source, str) else source
    if not callable(function):
        raise TaskError(f"{spec} is no function.")
    try:
        inspect.signature(function).bind(**(args or {}))
    except (TypeError, ValueError) as error:
        raise TaskError(f"{spec} does not take the arguments {sorted(args or {})} of [args]: {error}.") from None
    try:
        task = function(**(args or {}))
    except Exception as error:
        raise TaskError(f"{spec} raised {type(error).__name__}: {error}") from error
    if not isinstance(task, Task):
        raise TaskError(f"{spec} must return a bt_ray.Task, it returned {type(task).__name__}.")
    check_task(task, spec)
    return replace(task, metric=make_synchronous(task.metric))


def _import_task(spec: str) -> Any:
    where, separator, name = spec.rpartition(":")
    if not separator or not where or not name:
        raise TaskError(f'task = "{spec}": write "module:function" or "path/to/file.py:function".')
    module = _import_file(Path(where)) if where.endswith(".py") else _import_module(where)
    function = getattr(module, name, None)
    if function is None:
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise TaskError(f"{where} has no function {name!r}.{nearest(name, functions)}")
    return function


def check_task(task: Task, spec: str) -> None:
    """Raises `TaskError` for the first part of the task that cannot work, before anything is built from it."""
    if not isinstance(task.program, dspy.Module):
        raise TaskError(f"{spec}: program must be a dspy.Module, it is {type(task.program).__name__}.")
    if not task.program.predictors():
        raise TaskError(f"{spec}: the program has no predictors, so there is nothing to optimize.")
    if getattr(task.program, "_compiled", False):
        raise TaskError(f"{spec}: the program is compiled already; give an uncompiled one, or `program.reset_copy()`.")
    if not callable(task.metric):
        raise TaskError(f"{spec}: the metric cannot be called, it is {task.metric!r}.")
    _check_examples(task.trainset, f"{spec}: trainset", required=True)
    _check_examples(task.valset, f"{spec}: valset")
    _check_examples(task.testset, f"{spec}: testset")
    if task.optimizers is not None and not callable(task.optimizers):
        raise TaskError(
            f"{spec}: optimizers is a {type(task.optimizers).__name__} of instances. Optimizers keep state and lose the "
            "student's LM, so each step needs fresh ones: write `optimizers=lambda ctx: {...}` around the same dict."
        )
    for teacher in task.teachers:
        if not isinstance(teacher, dspy.Module):
            raise TaskError(f"{spec}: teacher must be a dspy.Module or a list of them, it is {type(teacher).__name__}.")
        ours = [name for name, _ in task.program.named_predictors()]
        theirs = [name for name, _ in teacher.named_predictors()]
        if ours != theirs:
            raise TaskError(f"{spec}: the teacher's predictors are {theirs}, the program's {ours}: they must be the same.")


def check_optimizers(task: Task, optimizers: Mapping[str, Teleprompter], strategies: Sequence[Sequence[str]]) -> None:
    """Raises `TaskError` if arguments or teachers cannot be given to these optimizers."""
    keys = list(optimizers)
    for key, arguments in task.optimizer_compile_args.items():
        if key not in optimizers:
            raise TaskError(f"optimizer_compile_args has key {key!r}.{nearest(key, keys)} The optimizers are {keys}.")
        optimizer, name = optimizers[key], type(optimizers[key]).__name__
        if "student" in arguments:
            raise TaskError(f"optimizer_compile_args[{key!r}] has 'student': BetterTogether passes the student itself.")
        accepted = list(inspect.signature(optimizer.compile).parameters)
        for argument in arguments:
            if argument not in accepted:
                raise TaskError(
                    f"optimizer_compile_args[{key!r}]: {name}.compile() takes no {argument!r}."
                    f"{nearest(argument, accepted)} It takes: {', '.join(accepted)}."
                )
        if isinstance(optimizer, GEPA) and arguments.get("teacher") is not None:
            raise TaskError(f"optimizer_compile_args[{key!r}]: GEPA takes no teacher. Remove it.")
    if not task.teachers:
        return
    used = {key for strategy in strategies for key in strategy}
    takers = {key for key in used if takes_teacher(optimizers[key])}
    if not takers:
        names = ", ".join(sorted(f"{key} ({type(optimizers[key]).__name__})" for key in used))
        raise TaskError(f"The task has a teacher, but no optimizer of the strategies takes one: {names}. Remove it.")
    several = {key for key in takers if not isinstance(optimizers[key], FinetuneTeleprompter)}
    if len(task.teachers) > 1 and several:
        raise TaskError(
            f"The task has {len(task.teachers)} teachers, and optimizer {sorted(several)[0]!r} takes one: name it in "
            "optimizer_compile_args."
        )


def _check_key(key: Any) -> None:
    """Raises `TaskError` for an optimizer's key that a strategy, DSPy or a folder cannot have as a name."""
    if not isinstance(key, str):
        raise TaskError(f"optimizers(ctx) has the key {key!r}: keys must be strings, since strategies name them.")
    if key in RESERVED_KEYS:
        raise TaskError(f"optimizers(ctx) has the key {key!r}: {key!r} is an argument of BetterTogether. Rename it.")
    if "/" in key or not key.strip("."):
        raise TaskError(f"optimizers(ctx) has the key {key!r}: a step's folder is named after it, so it must not be a path.")


def _check_examples(examples: Any, where: str, *, required: bool = False) -> None:
    if examples is None and not required:
        return
    if not isinstance(examples, Sequence) or isinstance(examples, str):
        raise TaskError(f"{where} must be a list of dspy.Example, it is {type(examples).__name__}.")
    if required and not examples:
        raise TaskError(f"{where} is empty.")
    for index, example in enumerate(examples):
        if not isinstance(example, dspy.Example):
            raise TaskError(f"{where}[{index}] must be a dspy.Example, it is {type(example).__name__}.")
        if example._input_keys is None:
            raise TaskError(f"{where}[{index}] does not say which fields are inputs: add `.with_inputs(...)`.")


def _import_module(name: str) -> ModuleType:
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise TaskError(f"Module {name} cannot be imported: {type(error).__name__}: {error}") from error


class _UncachedLoader(SourceFileLoader):
    """Compiles a file each time: Python's cache misses an edit of equal length within a second of the last one."""

    def path_stats(self, path: Any) -> Mapping[str, Any]:
        raise OSError(f"{path} is not cached")


def _import_file(path: Path) -> ModuleType:
    """Import a file under a name derived from its path, once, with its folder on `sys.path`."""
    path = path.resolve()
    if not path.is_file():
        raise TaskError(f"The task's file {path} does not exist.")
    name = f"bt_ray_task_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    if (folder := str(path.parent)) not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(name, path, loader=_UncachedLoader(name, str(path)))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise TaskError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    return module

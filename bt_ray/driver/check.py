"""What is checked before anything is paid for: the task, its optimizers, the strategies, the run directory, the cluster."""

import contextlib
import io
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dspy.teleprompt.bootstrap_finetune import FinetuneTeleprompter
from dspy.teleprompt.teleprompt import Teleprompter

from bt_ray.errors import BtRayError, ConfigError, InfrastructureFailure, TaskError
from bt_ray.models import NoModels
from bt_ray.run_dir.reuse import check_sources
from bt_ray.run_dir.run_directory import check_run_directory
from bt_ray.settings.config import EveryStrategy, ServerConfig, StrategySearch, SweepConfig
from bt_ray.settings.space import Variant, variants
from bt_ray.slot.training.job import check_trainable
from bt_ray.step import StepKey
from bt_ray.strategy import BASELINE, all_prefixes, check_distinct, every, parse, step_label
from bt_ray.task.fingerprint import step_keys
from bt_ray.task.task import StepContext, Task, TaskFunction, check_optimizers, load_task, step_seed
from bt_ray.trial.failure_latch import FailureLatch
from bt_ray.trial.lm import ServedEngine, student_lm
from bt_ray.trial.program_lms import ServedModels, serving, weights_of
from bt_ray.weights import Weights, model_name


@dataclass(frozen=True)
class Checked:
    """A sweep that can start, under one variant of its settings.

    Attributes:
        config: The settings.
        values: Those that differ between variants, by name.
        task: The task, with LMs assigned that answer nothing.
        bases: The base models that the sweep serves, by id: none if all LMs are APIs'.
        examples: Sizes of trainset, valset (0: none) and testset.
        optimizers: The optimizers' class names by key.
        models_at_once: How many versions of served models the program asks at once, at most: among the models with slots
            of their own, by `Weights.model`, and under `""` among all others. Empty if the sweep serves none.
        strategies: The strategies, as they are written out; of a search all that it may try.
        keys: The key of the baseline and of each step of the strategies, by prefix.
    """

    config: SweepConfig
    values: dict[str, Any]
    task: Task
    bases: dict[str, Weights]
    examples: tuple[int, int, int]
    optimizers: dict[str, str]
    models_at_once: dict[str, int]
    strategies: tuple[str, ...]
    keys: dict[str, StepKey]


@dataclass(frozen=True)
class CheckedSweep:
    """A sweep that can start.

    Attributes:
        variants: By name; a sweep without a space has one, named `""`.
    """

    variants: dict[str, Checked]

    @property
    def first(self) -> Checked:
        return next(iter(self.variants.values()))

    @property
    def bases(self) -> dict[str, Weights]:
        """The base models that the sweep serves, by id: none if all LMs are APIs'."""
        return {weights_id: base for checked in self.variants.values() for weights_id, base in checked.bases.items()}

    @property
    def models_at_once(self) -> dict[str, int]:
        """How many versions of served models a program asks at once, at most, by whose slots they are in."""
        most: Counter[str] = Counter()
        for checked in self.variants.values():
            most |= Counter(checked.models_at_once)
        return {slots: most[slots] for checked in self.variants.values() for slots in checked.models_at_once}

    @property
    def asked_first(self) -> dict[str, Weights]:
        """The base model that programs ask at first, by whose slots it is in, of those slots that are for one alone."""
        at_once = self.models_at_once
        of: dict[str, list[Weights]] = {}
        for base in self.bases.values():
            of.setdefault(base.model if base.model in at_once else "", []).append(base)
        return {slots: bases[0] for slots, bases in of.items() if len(bases) == 1 and at_once[slots]}

    @property
    def servers(self) -> int:
        """The servers, at most, that programs ask, or, where these ask APIs alone, optimizers; 0 if no model is served."""
        asked = [slots for slots, count in self.models_at_once.items() if count] or list(self.models_at_once)
        return sum(self.first.config.server.of(slots).count for slots in asked)

    @property
    def keys(self) -> dict[str, StepKey]:
        """The key of each step, by its label, each once: that of the first variant that has it."""
        found: dict[str, tuple[str, StepKey]] = {}
        for variant, checked in self.variants.items():
            for prefix, key in checked.keys.items():
                found.setdefault(key.key, (step_label(prefix, variant), key))
        return dict(found.values())


def check_sweep(
    config: SweepConfig, run_dir: str | None, *, accept_changes: bool = False, build: TaskFunction | None = None
) -> CheckedSweep:
    """Check everything that needs no cluster.

    Args:
        config: The sweep's settings.
        run_dir: Where it would be kept; None to leave that out.
        accept_changes: Whether finished steps in `run_dir` may be computed again because something changed.
        build: The task's function, where it is given rather than named.

    Raises:
        BtRayError: The first thing that would make the sweep fail, and what to do about it.
    """
    checked = CheckedSweep({variant.name: _check_variant(variant, build or config.task) for variant in variants(config)})
    if isinstance(config.strategies, StrategySearch) and config.space:
        raise ConfigError("space: a search over strategies takes no space. Search first, then vary what it found.")
    _check_tracking(config)
    served = checked.bases.values()
    for model in config.server.models:
        if model_name(model) not in checked.models_at_once:
            shown = ", ".join(sorted({base.path for base in served})) or "none"
            raise ConfigError(f'server.models."{model}": the sweep serves no such model. It serves: {shown}.')
    if run_dir is not None:
        if config.trial.resume_optimizers and "://" in run_dir:
            raise ConfigError(
                "trial.resume_optimizers: optimizers keep their state in files, so the run directory must be on a "
                f"filesystem that all nodes share; it is {run_dir}."
            )
        check_run_directory(run_dir, checked.keys, accept_changes=accept_changes)
    check_sources(config, run_dir)
    return checked


def _check_tracking(config: SweepConfig) -> None:
    for package in ("mlflow", "wandb"):
        if getattr(config.tracking, package) is not None and find_spec(package) is None:
            raise ConfigError(f'tracking.{package}: the package is not installed. Run: pip install "bt-ray[{package}]"')


def _check_variant(variant: Variant, source: str | TaskFunction) -> Checked:
    config = variant.config
    none = NoModels("No model is served during a check: build() and optimizers(ctx) must not ask a served LM.")
    models = ServedModels(ServedEngine(none, FailureLatch(), retries=0, timeout_s=1, max_connections=1), config)
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()), serving(models):
        task = load_task(source, config.args)
        models.assign_student(task.program)

        def context(prefix: str) -> StepContext:
            return StepContext(prefix, step_seed(config.seed, prefix), Path(scratch), student_lm(task.program))

        optimizers = _build_optimizers(task, context(BASELINE))
        strategies = _strategies(config, optimizers)
        parsed = [parse(strategy, optimizers) for strategy in strategies]
        keys = step_keys(task, config, models.student, all_prefixes(strategies), context)
    check_distinct(strategies)
    check_optimizers(task, optimizers, parsed)
    examples = _check_validation(task, config, len(strategies))
    weight_keys = {key for key, optimizer in optimizers.items() if isinstance(optimizer, FinetuneTeleprompter)}
    served = {models.bases[weights_id] for weights_id in weights_of(task.program).values()}
    if any(key in weight_keys for strategy in parsed for key in strategy):
        for weights in served:
            check_trainable(config.server.of(weights.model), config.train)
    names = {key: type(optimizer).__name__ for key, optimizer in optimizers.items()}
    models_at_once = _models_at_once(config.server, models.bases.values(), served)
    models.take_back(task.program)
    return Checked(config, variant.values, task, models.bases, examples, names, models_at_once, strategies, keys)


def _models_at_once(server: ServerConfig, bases: Iterable[Weights], asked: Iterable[Weights]) -> dict[str, int]:
    own = {model_name(model): model for model in server.models}
    for base in bases:
        if base.model in own and own[base.model] != base.path:
            raise ConfigError(
                f"server.models: {base.path} and {own[base.model]} are called the same, so their weights could not be told "
                "apart. Rename one of the folders."
            )
    slots = {base: base.model if base.model in own else "" for base in bases}
    at_once = Counter(slots[base] for base in asked)
    return {name: at_once[name] for name in slots.values()}


def _strategies(config: SweepConfig, optimizers: Mapping[str, Teleprompter]) -> tuple[str, ...]:
    given = config.strategies
    if isinstance(given, EveryStrategy):
        return tuple(every(given.optimizers or list(optimizers), given.max_length))
    return given


def _build_optimizers(task: Task, context: StepContext) -> Mapping[str, Teleprompter]:
    try:
        return task.build_optimizers(context)
    except BtRayError:
        raise
    except InfrastructureFailure as failure:
        raise TaskError(str(failure.__cause__)) from failure
    except Exception as error:
        raise TaskError(f"optimizers(ctx) raised {type(error).__name__}: {error}") from error


def _check_validation(task: Task, config: SweepConfig, strategies: int) -> tuple[int, int, int]:
    train, test = len(task.trainset), len(task.testset or ())
    if task.valset:
        return train, len(task.valset), test
    held_out = len(task.validation_examples(config.valset_ratio))
    if held_out == 0 and strategies > 1:
        why = "valset_ratio = 0" if config.valset_ratio == 0 else f"valset_ratio = {config.valset_ratio} of {train} examples"
        raise ConfigError(
            f"There is no validation ({why}, and the task has no valset), so nothing to rank "
            f"{strategies} strategies by. Give a valset, a larger valset_ratio, or a single strategy."
        )
    if held_out == train:
        raise ConfigError(f"valset_ratio = {config.valset_ratio} leaves no training example.")
    return train - held_out, held_out, test

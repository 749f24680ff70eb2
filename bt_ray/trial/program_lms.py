"""The LMs that a task's programs get: of the sweep's model, of other models that the task names, of a step's weights."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import dspy

from bt_ray.errors import TaskError
from bt_ray.settings.config import SweepConfig
from bt_ray.settings.toml import looks_like_path
from bt_ray.slot.base_models import base_weights
from bt_ray.trial.lm import MODEL_PREFIX, ServedEngine, ServedLM, assign_lm, make_served_lm
from bt_ray.weights import Weights, model_name


class ServedModels:
    """Makes LMs that one engine answers for.

    Args:
        engine: Asks the servers.
        config: The sweep's settings.
        known: Models of the hub, by name, as the driver found them: all processes of a sweep mean the same commit.

    Attributes:
        bases: The base models that LMs were made for, by id.
        student: The sweep's own model, since a predictor was given it.
    """

    def __init__(self, engine: ServedEngine, config: SweepConfig, known: Mapping[str, Weights] | None = None) -> None:
        self.engine = engine
        self.bases: dict[str, Weights] = {}
        self.student: Weights | None = None
        self._config = config
        self._known: dict[str, Weights] = dict(known or {})

    def lm(self, model: str, temperature: float | None = None, max_tokens: int | None = None) -> ServedLM:
        """An LM for a base model: a folder, or a model id of the hub. `[lm]` says how it samples, unless this does.

        Raises:
            ConfigError: `model` is a path and no checkpoint is there.
        """
        given = {"temperature": temperature, "max_tokens": max_tokens}
        sampling = self._config.lm.model_copy(update={name: value for name, value in given.items() if value is not None})
        if model not in self._known:
            self._known[model] = base_weights(model, self._config.server.of(model_name(model)).engine_options)
        weights = self._known[model]
        self.bases[weights.id] = weights
        self.engine.models.add(weights)
        return make_served_lm(weights, self.engine, sampling)

    def version(self, weights: Weights, of: dspy.LM | None) -> ServedLM:
        """An LM for given weights, which samples as the LM `of` does whose version it is."""
        self.engine.models.add(weights)
        if isinstance(of, ServedLM):
            copied: ServedLM = of.copy(model=f"{MODEL_PREFIX}{weights.id}")
            return copied
        return make_served_lm(weights, self.engine, self._config.lm)

    def assign_student(self, program: dspy.Module) -> None:
        """Give the sweep's model to every predictor of `program` that has no LM.

        Raises:
            TaskError: There is such a predictor, and the sweep has no model.
        """
        without = [(name, predictor) for name, predictor in program.named_predictors() if predictor.lm is None]
        if not without:
            return
        if self._config.model is None:
            raise TaskError(
                f"Predictor {without[0][0]!r} has no LM, and the sweep names no model to serve: give `model` in the sweep's "
                "settings, or set the program's LMs in build()."
            )
        lm = self.lm(self._config.model)
        self.student = self.bases[lm.weights_id]
        assign_lm(program, lm)

    def take_back(self, program: dspy.Module) -> None:
        """Take its LMs from a program: one that a task's file made once is every call's."""
        for predictor in program.predictors():
            if isinstance(predictor.lm, ServedLM) and predictor.lm.engine is self.engine:
                predictor.lm = None


_serving: ContextVar[ServedModels | None] = ContextVar("bt_ray_served_models", default=None)


@contextmanager
def serving(models: ServedModels) -> Iterator[None]:
    """The context in which `served` makes its LMs by `models`."""
    token = _serving.set(models)
    try:
        yield
    finally:
        _serving.reset(token)


def served(model: str, *, temperature: float | None = None, max_tokens: int | None = None) -> dspy.LM:
    """An LM for another model, which the sweep's servers serve as they serve its own: a teacher's, or a predictor's.

    For `build()` and `optimizers(ctx)` of a task. A predictor that has it is fine-tuned like any other. Servers take turns
    between models where there are fewer servers than models.

    Args:
        model: A model id of the hub, or a folder, relative to the working directory.
        temperature: Default: `[lm]`'s.
        max_tokens: Default: `[lm]`'s.

    Raises:
        TaskError: No sweep, check or `bt_ray.load` is under way.
        ConfigError: `model` is a path and no checkpoint is there.
    """
    models = _serving.get()
    if models is None:
        raise TaskError(
            f'bt_ray.served("{model}") names a model of a sweep: call it inside build() or optimizers(ctx), when a sweep, '
            "a check or bt_ray.load calls them."
        )
    here = Path.cwd()
    return models.lm(str((here / model).resolve()) if looks_like_path(model, here) else model, temperature, max_tokens)


def weights_of(program: dspy.Module) -> dict[str, str]:
    """The id of the weights that each predictor with a served LM uses, by the predictor's name."""
    named = program.named_predictors()
    return {name: predictor.lm.weights_id for name, predictor in named if isinstance(predictor.lm, ServedLM)}


def api_models_of(program: dspy.Module) -> dict[str, str]:
    """The model of each predictor whose LM is not served here, by the predictor's name."""
    named = program.named_predictors()
    return {n: p.lm.model for n, p in named if isinstance(p.lm, dspy.LM) and not isinstance(p.lm, ServedLM)}


def assign_versions(
    program: dspy.Module,
    weights: Mapping[str, str],
    api_models: Mapping[str, str],
    models: ServedModels,
    find: Callable[[str], Weights],
) -> None:
    """Give each predictor the LM that it had in a finished step.

    Predictors that shared an LM, and have the same version of it, share one again: a weight optimizer trains it once.

    Args:
        program: A program of the task, with the LMs that the task gave it.
        weights: As `weights_of` the step's program.
        api_models: As `api_models_of` the step's program.
        models: Makes LMs.
        find: The weights of an id.
    """
    made: dict[tuple[dspy.LM | None, str], dspy.LM] = {}
    for name, predictor in program.named_predictors():
        own, served_id, model = predictor.lm, weights.get(name), api_models.get(name)
        if served_id is not None and not (isinstance(own, ServedLM) and own.weights_id == served_id):
            if (own, served_id) not in made:
                made[own, served_id] = models.version(find(served_id), own)
            predictor.lm = made[own, served_id]
        elif model is not None and own is not None and own.model != model:
            if (own, model) not in made:
                made[own, model] = own.copy(model=model)
            predictor.lm = made[own, model]

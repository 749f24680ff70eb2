"""A program as JSON keeps it.

The file is DSPy's own, so that `program.load("program.json")` reads it: the signatures and demos of predictors, without LMs.
DSPy leaves out `Predict.config`, and with the LMs how they sample; both are kept where they differ from the task's.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import dspy
import orjson
from dspy.adapters.utils import serialize_for_json
from dspy.utils.saving import get_dependency_versions

from bt_ray.task.fingerprint import digest, is_of_a_client
from bt_ray.trial.program_losses import LostInKeeping, differ, is_json, refuse_other_parameters, settings_of

METADATA, LM_SETTINGS = "metadata", "lm_settings"


def program_state(program: dspy.Module, task_program: dspy.Module) -> bytes:
    """What is kept of `program`, which an optimizer made of the task's.

    Raises:
        LostInKeeping: It has not the predictors of the task's program, or JSON cannot hold one's demos.
    """
    refuse_other_parameters(program, task_program)
    if other := list(_demos_that_are_none(program)):
        raise LostInKeeping(other)
    copied = program.deepcopy()
    for predictor in copied.predictors():
        predictor.lm, predictor.traces, predictor.train = None, [], []
        predictor.demos = [{name: _as_json(value) for name, value in _items(demo)} for demo in predictor.demos]
    state = copied.dump_state()
    theirs = dict(task_program.named_predictors())
    lm_settings = {}
    for name, predictor in program.named_predictors():
        config = _config_to_keep(predictor.config, theirs[name].config)
        if config is not None:
            (state if isinstance(program, dspy.Predict) else state[name])["config"] = config
        if changed := _find_changed_settings(predictor.lm, theirs[name].lm):
            lm_settings[name] = changed
    state[METADATA] = {"dependency_versions": get_dependency_versions(), LM_SETTINGS: lm_settings}
    try:
        return orjson.dumps(state, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
    except TypeError as error:
        raise LostInKeeping(list(_demos_json_cannot_hold(copied)) or [f"its state ({error})"]) from error


def load_state(program: dspy.Module, state: bytes) -> None:
    """Give `program` the state that `program_state` made. Its predictors keep their LMs, which sample as is kept."""
    values: dict[str, Any] = json.loads(state)
    lm_settings = (values.pop(METADATA, None) or {}).get(LM_SETTINGS, {})
    lms = [predictor.lm for predictor in program.predictors()]
    program.load_state(values)
    made: dict[tuple[dspy.BaseLM, str], dspy.BaseLM] = {}
    for (name, predictor), lm in zip(program.named_predictors(), lms, strict=True):
        predictor.lm = lm
        if lm is not None and (settings := lm_settings.get(name)):
            key = (lm, json.dumps(settings, sort_keys=True))
            if key not in made:
                made[key] = lm.copy(**settings)
            predictor.lm = made[key]


def _demos_that_are_none(program: dspy.Module) -> Iterator[str]:
    for name, predictor in program.named_predictors():
        if not isinstance(predictor.demos, list | tuple):
            yield f"the demos of predictor {name} ({type(predictor.demos).__name__})"
            continue
        for number, demo in enumerate(predictor.demos):
            if not isinstance(demo, dspy.Example | Mapping):
                yield f"demo {number + 1} of predictor {name} ({type(demo).__name__})"


def _items(demo: Any) -> Any:
    return demo.items(include_dspy=True) if isinstance(demo, dspy.Example) else demo.items()


def _as_json(value: Any) -> Any:
    return value if is_json(value) else serialize_for_json(value)


def _config_to_keep(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """A predictor's configuration, where it is not the task's and JSON holds it."""
    if digest(ours) == digest(theirs) or not is_json(ours) or any(map(is_of_a_client, ours)):
        return None
    return ours


def _find_changed_settings(ours: Any, theirs: Any) -> dict[str, Any]:
    """The parameters of an LM that are not those of the task's, and that JSON holds; None for one that is gone."""
    if not isinstance(ours, dspy.BaseLM) or not isinstance(theirs, dspy.BaseLM):
        return {}
    now, before = settings_of(ours), settings_of(theirs)
    changed = {name: now.get(name) for name in now.keys() | before.keys() if differ(now, before, name)}
    return {name: value for name, value in sorted(changed.items()) if is_json(value)}


def _demos_json_cannot_hold(program: dspy.Module) -> Iterator[str]:
    for name, predictor in program.named_predictors():
        for number, demo in enumerate(predictor.demos):
            for field, value in demo.items():
                try:
                    orjson.dumps({field: value})
                except TypeError as error:
                    yield f"demo {number + 1} of predictor {name} (its {field!r}: {error})"

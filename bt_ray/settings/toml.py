"""A sweep's TOML: read, with `--set key=value` in it, and its paths made absolute."""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bt_ray.errors import ConfigError
from bt_ray.settings.config import SweepConfig, make_config


def load_config(
    path: Path,
    overrides: Mapping[str, Any] | None = None,
    assignments: Sequence[str] = (),
    *,
    refuse_relative: bool = False,
) -> SweepConfig:
    """Read a sweep's TOML.

    Relative paths in the file (`task`, `model`, `run_dir`, `reuse`) are relative to the file; those in `overrides` and
    `assignments` to the current directory.

    Args:
        path: The TOML file.
        overrides: Top-level keys that replace the file's, None meaning "not given".
        assignments: `key=value` or `section.key=value`; the value is read as TOML, or else taken as a string.
        refuse_relative: Whether a relative `model` or `run_dir` is an error, as inside a Ray job.

    Raises:
        ConfigError: The file is missing or no TOML, or a key or value is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: it is not UTF-8 ({error.reason} at byte {error.start}).") from None
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}.") from None
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    for assignment in assignments:
        _assign(given, assignment)
    from_file = {key: value for key, value in values.items() if key not in given or isinstance(value, dict)}
    from_file = with_absolute_paths(from_file, path.parent, refuse_relative=refuse_relative)
    given = with_absolute_paths(given, Path.cwd(), refuse_relative=refuse_relative)
    return make_config(_merge(from_file, given), source=str(path))


def with_absolute_paths(given: Mapping[str, Any], base: Path, *, refuse_relative: bool = False) -> dict[str, Any]:
    """`given` with its relative paths made absolute: what they mean depends on where they were written.

    Args:
        given: Values of settings.
        base: What relative paths are relative to.
        refuse_relative: Whether a relative `model` or `run_dir` is an error, as inside a Ray job.

    Raises:
        ConfigError: A path was refused.
    """
    base, values = base.resolve(), dict(given)
    if refuse_relative:
        _refuse_relative_paths(values, base)
    task = values.get("task")
    if isinstance(task, str) and task.rpartition(":")[0].endswith(".py"):
        values["task"] = str(base / task)
    if isinstance(model := values.get("model"), str):
        values["model"] = _absolute_model(model, base)
    space = values.get("space")
    if isinstance(space, dict) and isinstance(space.get("model"), list):
        values["space"] = {**space, "model": [_absolute_model(model, base) for model in space["model"]]}
    if isinstance(run_dir := values.get("run_dir"), str):
        values["run_dir"] = _absolute_location(run_dir, base)
    if (reuse := values.get("reuse")) is not None:
        values["reuse"] = [_absolute_location(one, base) if isinstance(one, str) else one for one in _as_list(reuse)]
    server = values.get("server")
    if isinstance(server, Mapping) and isinstance(own := server.get("models"), Mapping):
        values["server"] = {**server, "models": {_absolute_model(model, base): own[model] for model in own}}
    tracking = values.get("tracking")
    if isinstance(tracking, Mapping) and isinstance(folder := tracking.get("tensorboard"), str):
        values["tracking"] = {**tracking, "tensorboard": str((base / Path(folder).expanduser()).resolve())}
    return values


def _absolute_model(model: str, base: Path) -> str:
    return str((base / Path(model).expanduser()).resolve()) if looks_like_path(model, base) else model


def _absolute_location(location: str, base: Path) -> str:
    return location if "://" in location else str((base / Path(location).expanduser()).resolve())


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _refuse_relative_paths(values: Mapping[str, Any], base: Path) -> None:
    server = values.get("server")
    own = server.get("models", {}) if isinstance(server, Mapping) else {}
    given = [("model", values.get("model"), "--set model=..."), ("run_dir", values.get("run_dir"), "--run-dir ...")]
    given += [("reuse", one, "--set reuse=['\"/...\"']") for one in _as_list(values.get("reuse"))]
    for key, value, better in [*given, *(("server.models", of, '[server.models."/..."]') for of in own)]:
        if not isinstance(value, str) or "://" in value or Path(value).expanduser().is_absolute():
            continue
        if key in ("run_dir", "reuse") or looks_like_path(value, base):
            raise ConfigError(
                f"{key}: {value} is relative. A job's working directory is a copy that goes away with the job: give an "
                f"absolute path that all nodes share ({better})."
            )


def looks_like_path(model: str, base: Path) -> bool:
    """Whether `model` names a folder rather than a model of the hub (`name` or `organization/name`)."""
    return model.startswith((".", "/", "~")) or model.count("/") > 1 or (base / model).exists()


def _assign(values: dict[str, Any], assignment: str) -> None:
    key, separator, text = assignment.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {assignment}: write it as key=value, for example server.max_model_len=2048.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    try:
        *sections, name = _path(tomllib.loads(f"{key} = true"))
    except tomllib.TOMLDecodeError:
        raise ConfigError(f"--set {assignment}: {key.strip()!r} is no key.") from None
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {assignment}: {section!r} is a value, not a section.")
    values[name] = value


def _path(nested: Mapping[str, Any]) -> list[str]:
    """The keys that lead to the one value of nested tables."""
    ((key, below),) = nested.items()
    return [key, *(_path(below) if isinstance(below, dict) else [])]


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged

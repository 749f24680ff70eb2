"""Write `docs/settings.md`: every setting of a sweep, with its type, its default, and its docstring in `bt_ray.settings`.

    python scripts/write_settings_page.py

A test compares the page with what this script makes.
"""

import ast
import inspect
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from bt_ray.settings import config, space

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
SECTIONS = {
    "lm": config.LMConfig,
    "server": config.ServerConfig,
    "train": config.TrainConfig,
    "trial": config.TrialConfig,
    "tracking": config.TrackingConfig,
}
TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", Any: "any"}
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}

HEAD = """\
# Settings

Made from the docstrings in [`bt_ray/settings/config.py`](../bt_ray/settings/config.py) by `scripts/write_settings_page.py`.

A sweep's settings are a TOML file. `task` and `strategies` are required, and `model` unless every LM is an API's. An unknown
key is an error that names the nearest right one. Relative paths in the file are relative to the file.

On the command line `--set section.key=value` replaces a setting:
`bt-ray sweep my/sweep.toml --set server.max_model_len=2048`. In Python,
`bt_ray.sweep("my/task.py:build", config)` takes them as a `dict`.
"""

AFTER_SERVER = """
bt_ray sets some of vLLM's options itself. They are refused in `[server]`:
"""

SPACE = """\
## `[space]`

Settings to vary. [sweeps.md](sweeps.md#vary-settings) explains how. A key is the name of a setting: `seed`, `"args.demos"`,
`"train.learning_rate"`. Its value is a list, or a distribution of
[Ray Tune's](https://docs.ray.io/en/latest/tune/api/search_space.html) with its arguments:

```toml
[space]
seed = [0, 1, 2]
"train.learning_rate" = { loguniform = [1e-5, 1e-3] }
```
"""


def settings_page() -> str:
    """The page, as it should be."""
    parts = [HEAD, "## Top level\n", *_table(config.SweepConfig, left_out=SECTIONS), _strategies()]
    for name, section in SECTIONS.items():
        parts += [f"## `[{name}]`\n", _about(section, f"`[{name}]`: "), "", *_table(section)]
        if section is config.ServerConfig:
            refused = [f"| `{key}` | {reason} |" for key, reason in config.ENGINE_OPTIONS_OF_BT_RAY.items()]
            parts += [AFTER_SERVER, "| option | why |", "|---|---|", *refused]
        parts.append("")
    distributions = ", ".join(f"`{name}`" for name in space.DISTRIBUTIONS)
    shared = [f"| `{key}` | {reason} |" for key, reason in space.SHARED.items()]
    parts += [SPACE, f"Distributions: {distributions}.", "", "These settings cannot vary:", ""]
    parts += ["| setting | why |", "|---|---|", *shared]
    return "\n".join(parts) + "\n"


def _strategies() -> str:
    """The ways to write `strategies`."""
    listed = '- `strategies = ["p -> w", "w -> p"]`: the strategies of a list.'
    lines = ["", "There are three ways to write `strategies`:", "", listed]
    for kind in (config.EveryStrategy, config.StrategySearch):
        form, _, meaning = _about(kind).partition("`: ")
        lines.append(f"- {form}`: {meaning}")
    lines += ["", "A search has these keys:", "", *_table(config.StrategySearch), ""]
    return "\n".join(lines)


def _table(section: type[BaseModel], left_out: Collection[str] = ()) -> Iterator[str]:
    docstrings = {name: text for kind in reversed(section.__mro__) for name, text in _field_docstrings(kind).items()}
    yield "| key | type | default | what |"
    yield "|---|---|---|---|"
    for name, field in section.model_fields.items():
        if name not in left_out:
            yield f"| `{name}` | {_describe_type(field)} | {_describe_default(field)} | {docstrings[name]} |"


def _field_docstrings(kind: type) -> dict[str, str]:
    """The string below each field of a class, by the field's name, in one line."""
    if not issubclass(kind, BaseModel) or kind is BaseModel:
        return {}
    (definition,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, text in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            found[field.target.id] = " ".join(ast.literal_eval(text.value).split())
    return found


def _about(section: type[BaseModel], prefix: str = "") -> str:
    """The docstring of a section, without what its heading says."""
    text = inspect.cleandoc(section.__doc__ or "").removeprefix(prefix)
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in (text[:1].upper() + text[1:]).split("\n\n"))


def _describe_type(field: FieldInfo) -> str:
    shown = _name_of(field.annotation)
    bounds = [f"{words} {value:g}" for name, words in BOUNDS.items() for value in _bound(field, name)]
    return f"{shown}, {' and '.join(bounds)}" if bounds else shown


def _bound(field: FieldInfo, name: str) -> list[float]:
    return [value for mark in field.metadata if (value := getattr(mark, name, None)) is not None]


def _name_of(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return ", ".join(f'`"{value}"`' for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_name_of(one) for one in arguments if one is not types.NoneType))
    if origin is tuple:
        return f"list of {_name_of(arguments[0])}s"
    if origin is dict or (isinstance(annotation, type) and issubclass(annotation, BaseModel | Mapping)):
        return "table"
    return TYPES[annotation]


def _describe_default(field: FieldInfo) -> str:
    """As TOML has it; nothing for a setting whose docstring tells its default."""
    if field.is_required():
        return "required"
    match field.get_default(call_default_factory=True):
        case None:
            return ""
        case bool() as switch:
            shown = str(switch).lower()
        case str() as text:
            shown = f'"{text}"'
        case float() as number:
            shown = f"{number:g}"
        case tuple() as items:
            shown = str(list(items))
        case other:
            shown = str(other)
    return f"`{shown}`"


if __name__ == "__main__":
    PAGE.write_text(settings_page())

"""Write settings as a person would."""

import json
from typing import Any


def toml(values: dict[str, Any]) -> str:
    """`values` as TOML: one level of tables, and those in them inline."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items() if not isinstance(value, dict)]
    for name, table in values.items():
        if isinstance(table, dict):
            lines += [f"[{name}]", *(f"{key} = {inline(value)}" for key, value in table.items())]
    return "\n".join(lines)


def inline(value: Any) -> str:
    if isinstance(value, dict):
        names = {key: key if key.isidentifier() else json.dumps(key) for key in value}
        return "{" + ", ".join(f"{names[key]} = {inline(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)

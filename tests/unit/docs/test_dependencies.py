"""`docs/dependencies.md`: each name is in the package that it is said to be in, and in the file that uses it.

Sources are read and not imported, so vLLM and transformers cost nothing here.
"""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

PAGE = ROOT / "docs" / "dependencies.md"
PRIVATE = re.compile(r"\b(\w+)\._(?!_)\w+")
"""A private attribute, and whose it is."""
OWN = {"self", "cls"}
OF_PYTHON = {"os._exit", "parts._replace", "value._name_", "value._value_", "member._value_"}
"""Documented, for all their underscores: of a process, of named tuples, of enums."""


def rows() -> Iterator[Any]:
    for line in PAGE.read_text().splitlines():
        cells = line.strip("| ").split(" | ")
        if len(cells) == 5 and cells[0].startswith("`"):
            yield pytest.param(*cells[:3], id=f"{cells[0].strip('`')}: {cells[1].partition(',')[0].strip('`')}")


def source_of(module: str) -> str:
    """The text of a module of an installed package."""
    top, *rest = module.split(".")
    found = importlib.util.find_spec(top)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"{top} is not installed")
    base = Path(found.submodule_search_locations[0], *rest)
    (file,) = (one for one in (base.with_suffix(".py"), base / "__init__.py") if one.exists())
    return file.read_text()


def test_there_is_a_row_for_each_package() -> None:
    packages = {row.values[0].strip("`").partition(".")[0] for row in rows()}
    assert packages >= {"dspy", "vllm", "transformers", "trl", "ray", "pydantic", "mlflow"}


@pytest.mark.parametrize(("module", "names", "used_in"), rows())
def test_each_name_is_in_its_module_and_in_the_files_that_use_it(module: str, names: str, used_in: str) -> None:
    source = source_of(module.strip("`"))
    files = re.findall(r"\]\(([^)]+)\)", used_in)
    assert files
    users = [(PAGE.parent / file).read_text() for file in files]
    for name in re.findall("`([^`]+)`", names):
        plain = name.removesuffix("()")
        whole = re.compile(rf"(?<!\w){re.escape(plain)}(?!\w)")
        assert whole.search(source), f"{module} has no {plain}"
        assert any(whole.search(user) for user in users), f"no file of {files} has {plain}"
        if name != plain:
            assert f"def {plain}(" in source
            assert f"self.{plain}" in source, f"{module} does not call {plain}"


def test_every_private_attribute_of_another_package_is_on_the_page() -> None:
    page = PAGE.read_text()
    found = {
        f"{match[0]} in {file.relative_to(ROOT)}"
        for file in sorted((ROOT / "bt_ray").rglob("*.py"))
        for match in PRIVATE.finditer(file.read_text())
        if match[1] not in OWN and match[0] not in OF_PYTHON and match[0].partition(".")[2] not in page
    }
    assert found == set()

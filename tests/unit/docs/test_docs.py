"""What the pages name exists."""

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_there(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_heading_leads_to_one(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", page.read_text()):
        headings = re.findall("^#+ (.+)$", (page.parent / target if target else page).read_text(), re.MULTILINE)
        assert anchor in {anchor_of(heading) for heading in headings}, f"{target}#{anchor}"


def anchor_of(heading: str) -> str:
    """As GitHub makes it: small letters, no punctuation, hyphens for spaces."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_test_that_a_page_links_is_in_the_file_that_it_links() -> None:
    named = [
        (page, name, target)
        for page in PAGES
        for name, target in re.findall(r"\[`(test_\w+)`\]\(([^)]+\.py)\)", page.read_text())
    ]
    assert len(named) > 20
    for page, name, target in named:
        assert f"def {name}(" in (page.parent / target).read_text(), f"{name} is not in {target}"


def test_every_test_in_the_table_of_differences_exists() -> None:
    tests = (ROOT / "tests" / "integration" / "test_differences.py").read_text()
    rows = re.findall(r"`(test_\w+)` \|$", (ROOT / "docs" / "differences.md").read_text(), re.MULTILINE)
    assert len(rows) >= 7
    assert not [name for name in rows if f"def {name}(" not in tests]


def test_every_error_that_a_page_quotes_is_said_somewhere() -> None:
    said = re.sub(r'"\s*\n\s*f?"', "", "".join(file.read_text() for file in sorted((ROOT / "bt_ray").rglob("*.py"))))
    quoted = re.findall("^### (.+)$", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE)
    assert len(quoted) > 10
    mistakes = (ROOT / "docs" / "tasks.md").read_text().partition("| `bt-ray check` says |")[2].partition("\n\n")[0]
    quoted += re.findall(r"^\| `+ ?(.+?) ?`+ \|", mistakes, re.MULTILINE)
    assert len(quoted) > 20
    parts = [part.strip() for quote in quoted for part in quote.split("…") if part.strip()]
    assert [part for part in parts if part not in said] == []


def test_the_dashboard_asks_for_metrics_that_are_exported_all_of_them_and_no_other() -> None:
    dashboard = (ROOT / "cluster" / "grafana_dashboard.json").read_text()
    source = (ROOT / "bt_ray" / "pool" / "metrics.py").read_text()
    endings = {"Gauge": "", "Histogram": "_bucket", "Counter": "_total"}
    exported = {f"ray_{name}{endings[kind]}" for kind, name in re.findall(r'(Gauge|Histogram|Counter)\(\s*"(\w+)"', source)}
    asked = {
        name for panel in json.loads(dashboard)["panels"] for name in re.findall(r"ray_bt_ray_\w+", str(panel["targets"]))
    }
    assert asked == exported

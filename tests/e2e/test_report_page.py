"""The report of a sweep in headless Chromium, opened from disk: what it shows, at two widths, in light and in dark."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright
from support.made_sweep import EXAMPLES, HOSTILE, IMAGE, LONG, example, made_sweep
from typer.testing import CliRunner

from bt_ray.cli import app
from bt_ray.run_dir.examples import examples_file, keep_examples
from bt_ray.run_dir.step_store import StepStore
from bt_ray.run_dir.storage import open_storage
from bt_ray.step import StepKey

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = ["--no-sandbox", "--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("there is no Chromium: install one, as in `apt install chromium`")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=QUIET)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pages of a sweep of 200 candidates with failures, of one that runs and kept no examples, of one that kept some."""
    folder = tmp_path_factory.mktemp("reports")
    pages = {}
    for name, length, kept in (("ended", 5, EXAMPLES), ("running", 2, 0), ("partly", 1, 20)):
        made_sweep(folder / name, length, ended=name == "ended", kept=kept)
        told = CliRunner().invoke(app, ["report", str(folder / name), "--gpu-hour-price", "2.5"])
        assert told.exit_code == 0, told.output
        pages[name] = folder / name / "report.html"
        assert told.output.strip() == str(pages[name])
    return pages


@pytest.fixture(params=[1280, 390], ids=["wide", "phone"])
def width(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def opened(browser: Browser, width: int) -> Iterator[Any]:
    """Opens a file as a page of this width, and at the end wants no console error and no request but of that file."""
    asked: list[str] = []
    wrong: list[str] = []
    pages: list[Page] = []

    def open_page(file: Path, **settings: Any) -> Page:
        page = browser.new_page(viewport={"width": width, "height": 900}, **settings)
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(file.as_uri())
        pages.append(page)
        return page

    yield open_page
    assert wrong == []
    assert {url for url in asked if not url.startswith("data:")} == {page.url for page in pages}
    for page in pages:
        page.close()


def drawn(page: Page, plot: str) -> int:
    """How many things are drawn in a plot."""
    return page.locator(f'[data-plot="{plot}"] .main-svg').count()


def test_it_shows_a_sweep_of_200_candidates_with_failures(opened: Any, reports: dict[str, Path], width: int) -> None:
    page = opened(reports["ended"])
    assert page.locator("details[data-candidate]").count() > 200
    for plot in ("score-by-step", "trie", "timeline", "score-by-cost"):
        assert drawn(page, plot) > 0, plot
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing is wider than the page"
    assert re.search(r"^Best program: .* on the valset\.", page.locator("#winner").inner_text())
    assert "in money" in page.locator("header").inner_text()
    rows = page.locator("#ranking tbody tr")
    assert rows.count() == 3 + 9 + 27 + 81 + 243
    scores = [float(text.split()[0]) for text in page.locator("#ranking tbody tr td:nth-child(3)").all_inner_texts() if text]
    assert scores == sorted(scores, reverse=True)
    assert HOSTILE in page.locator("#ranking").inner_text(), "shown, and not run"


def test_a_candidate_shows_its_prompt_beside_its_parents_its_demos_and_its_loss(
    opened: Any, reports: dict[str, Path]
) -> None:
    page = opened(reports["ended"])
    prompted = page.locator("details", has=page.locator("summary b", has_text=re.compile("^p -> p$")))
    assert not prompted.locator(".prompt").first.is_visible()
    prompted.locator("summary").click()
    before, after = prompted.locator(".prompt").all_inner_texts()
    assert (before, after) == ("Double the number carefully.", "Double the number carefully carefully.")
    assert prompted.locator("ins").all_inner_texts() == [" carefully"]
    assert prompted.locator("tbody tr").count() == 2
    assert HOSTILE in prompted.locator("tbody").inner_text()

    trained = page.locator("details", has=page.locator("summary b", has_text=re.compile("^w$")))
    trained.locator("summary").click()
    told = "fine-tuned on 24 examples, 2 of them left out as too long, 3 of them cut off at train.max_length"
    assert told in trained.inner_text()
    assert trained.locator(".main-svg").count() > 0
    failing = page.locator("details", has=page.locator("summary b", has_text=re.compile("^p$")))
    failing.locator("summary").click()
    assert "3 examples scored 0 because of an error: AdapterParseError: no answer" in failing.inner_text()
    assert re.search(r"7 of \d+ answers were cut off at lm.max_tokens", failing.inner_text())


def differing(run_dir: Path, one: str, other: str) -> tuple[list[int], list[int]]:
    """The numbers of the examples that a step wins against another, and of those that it loses."""
    steps = [StepStore(open_storage(str(run_dir))).read(key) for key in (one, other)]
    pairs = list(enumerate(zip(*(step.example_scores for step in steps if step), strict=True), start=1))
    return [number for number, (a, b) in pairs if a > b], [number for number, (a, b) in pairs if a < b]


@pytest.mark.parametrize(("name", "kept"), [("ended", EXAMPLES), ("partly", 20), ("running", 0)])
def test_two_candidates_can_be_compared_example_by_example(
    opened: Any, reports: dict[str, Path], name: str, kept: int
) -> None:
    page = opened(reports[name])
    page.select_option("#one", "k1")
    page.select_option("#other", "k2")
    for numbers, said, shown in zip(
        differing(reports[name].parent, "k1", "k2"), ("#wins", "#losses"), ("#won", "#lost"), strict=True
    ):
        with_text, without = [n for n in numbers if n <= kept], [n for n in numbers if n > kept]
        assert [int(text) for text in page.locator(f"{shown} li > span").all_inner_texts()] == with_text
        text = page.locator(said).inner_text()
        assert f"on {len(numbers)} of 40 validation examples" in text
        assert re.findall(r"\d+", text.partition("numbers ")[2]) == [str(number) for number in without]
    page.select_option("#other", "k1")
    assert "on 0 of 40 validation examples." in page.locator("#wins").inner_text()
    assert page.locator("#won, #lost").filter(visible=True).count() == 0


def test_examples_that_differ_are_shown_with_their_inputs_and_labels(
    opened: Any, reports: dict[str, Path], width: int
) -> None:
    page = opened(reports["ended"])
    page.select_option("#one", "k1")
    page.select_option("#other", "k2")
    won, lost = differing(reports["ended"].parent, "k1", "k2")
    assert {number % 3 for number in won + lost} == {0, 1, 2}, "hostile, long and short ones"
    for number, row in zip(won + lost, page.locator(".examples li").all(), strict=True):
        inputs, labels = row.locator(".inputs").inner_text(), row.locator(".labels").inner_text()
        if number % 3 == 0:
            assert (inputs, labels) == (f"question: {HOSTILE}\n{IMAGE}: {IMAGE}", f"answer: {HOSTILE}")
        else:
            passage = "Short." if number % 3 == 2 else f"{LONG[:299]}…"
            assert (inputs, labels) == (f"question: number {number}\npassage: {passage}", f"answer: {2 * number}")
    assert page.locator("script").count() == 4, "the page's own"
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing is wider than the page"


def test_candidates_validated_on_different_examples_are_not_compared(opened: Any, tmp_path: Path) -> None:
    storage = made_sweep(tmp_path, 1)
    steps = storage.read_json("sweep.json")["steps"]
    steps["w"] |= {"parent": "", "parts": {"valset": "another"}}
    storage.write_json("sweep.json", {"steps": steps})
    keep_examples(storage, examples_file(StepKey(**steps["w"])), [example(2)])
    assert CliRunner().invoke(app, ["report", str(tmp_path)]).exit_code == 0
    page = opened(tmp_path / "report.html")
    page.select_option("#one", "k1")
    page.select_option("#other", "k0")
    assert page.locator("#apart").is_hidden()
    assert page.locator("#wins").is_visible()
    page.select_option("#other", "k2")
    assert page.locator("#apart").is_visible()
    assert page.locator("#wins").is_hidden()


def test_a_running_sweep_has_a_report_too(opened: Any, reports: dict[str, Path]) -> None:
    page = opened(reports["running"])
    assert page.locator("#headline").inner_text().startswith("No update for ")
    assert page.locator("#winner").inner_text().startswith("Best program so far: ")
    assert drawn(page, "trie") > 0


def test_it_can_be_read_in_the_dark(opened: Any, reports: dict[str, Path]) -> None:
    page = opened(reports["running"], color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 28)"
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(232, 232, 232)"
    label = page.locator('[data-plot="score-by-step"] .xtick text').first
    assert label.evaluate("element => getComputedStyle(element).fill") == "rgb(232, 232, 232)"

"""The report of real runs in a real browser without network: figures, filters, keys, and model text that attacks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from igrpo.report.command import write_report
from tests.report.conftest import EVIL

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def page_path(runs) -> Path:
    """The report, after one completion and one reward's name were made to attack."""
    path = runs[1] / "completions.jsonl"
    groups = [json.loads(line) for line in path.read_text().splitlines()]
    groups[0]["refinements"][0]["text"] = f"{EVIL} needle 🙂"
    groups[0]["drafts"][0]["rewards"][EVIL] = 1.0
    path.write_text("".join(json.dumps(g) + "\n" for g in groups))
    return write_report(runs, runs[0].parent / "report.html")


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs chromium (Debian: apt-get install chromium)")
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright)")
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, page_path):
    """An offline page of 1280 pixels; afterwards nothing may have been fetched, said or asked."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True)
    page = context.new_page()
    requests, said = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: (said.append(f"dialog {dialog.message}"), dialog.dismiss()))
    page.goto(page_path.as_uri())
    yield page
    context.close()
    assert requests == [page_path.as_uri()] and said == []


def test_figures_are_there_whole_and_legible_at_1280_pixels(page, page_path):
    names = {f.get_attribute("id").removeprefix("figure-") for f in page.query_selector_all("figure")}
    assert names >= {
        "reward", "bare_accuracy", "sampled_accuracy", "length", "reward_functions", "stages", "copies",
        "zero_variance", "entropy", "grad_norm", "lengths", "kl_clip", "mismatch", "optimiser", "throughput",
        "time_split", "memory", "learner_tokens", "tokens",
    }  # fmt: skip
    assert names == {p.stem for p in page_path.with_name("report_figures").iterdir()}
    for svg in page.query_selector_all("figure > svg"):
        box = svg.bounding_box()
        assert box["width"] > 500 and box["height"] > 200
    texts = page.evaluate("""[...document.querySelectorAll("figure svg text")].map(t => {
        const box = t.getBoundingClientRect();
        const pixels = parseFloat(getComputedStyle(t).fontSize) * Math.hypot(t.getScreenCTM().a, t.getScreenCTM().b);
        return [t.textContent, box.left, box.right, pixels]})""")
    assert len(texts) > 200
    for text, left, right, pixels in texts:
        assert left >= 0 and right <= 1280 and pixels >= 11, text
    assert page.evaluate("document.documentElement.scrollWidth") == 1280


def test_tables_and_arms(page):
    assert [e.inner_text().split("\n")[0] for e in page.query_selector_all(".arms > span")] == [
        "grpo", "igrpo 2 seeds: igrpo-1, igrpo-2"]  # fmt: skip
    rows = page.locator("#results table").first.locator("tbody tr, tr").all_inner_texts()
    assert any(row.startswith("igrpo\t2\t3") for row in rows)
    assert "algorithm\tgrpo\tigrpo\tigrpo" in page.locator("#settings").inner_text()


def test_filters_keys_and_changes(page):
    shown, prompt = page.locator("#shown"), page.locator("#group pre").first
    assert shown.inner_text() == "18 of 18 groups" and EVIL in prompt.inner_text()
    page.select_option("#f-run", "grpo")
    assert shown.inner_text() == "6 of 18 groups" and page.locator("#group ins").count() == 0
    page.select_option("#f-run", "")
    page.fill("#f-from", "3")
    assert shown.inner_text() == "6 of 18 groups"
    page.click("#f-clear")
    page.select_option("#f-tag", "copies draft" if "copies draft" in tags(page) else "signal")
    inside, everything = (int(word) for word in shown.inner_text().split()[::2][:2])
    assert everything == 18 and inside == sum(page.input_value("#f-tag") in g["tags"] for g in data(page)) > 0
    page.fill("#f-text", "no such words anywhere")
    assert shown.inner_text() == "0 of 18 groups" and "No group fits" in page.locator("#group").inner_text()


def data(page) -> list[dict]:
    return json.loads(page.locator("#completions-data").text_content())


def tags(page) -> set[str]:
    return {tag for group in data(page) for tag in group["tags"]}


def test_keyboard_alone_is_enough(page):
    page.keyboard.press("/")
    page.keyboard.type("NEEDLE")
    assert page.locator("#shown").inner_text() == "1 of 18 groups"
    assert "refinement 1" in page.locator("#group").inner_text() and page.locator("#group ins").count() > 0
    assert "needle 🙂" in page.locator("#group ins").first.inner_text()
    page.keyboard.press("Escape")
    dropped = page.locator("#group del").first
    assert dropped.is_visible()
    page.keyboard.press("d")
    assert not dropped.is_visible()
    page.click("#f-clear")
    page.focus("#groups")

    def selected() -> int:
        return int(page.locator("[aria-selected=true]").get_attribute("id").removeprefix("g"))

    assert selected() == 6  # the group that was found stays the selected one; iGRPO's groups follow GRPO's six
    for key, expected in (("j", 7), ("ArrowDown", 8), ("k", 7), ("Home", 0), ("k", 0), ("End", 17), ("j", 17)):
        page.keyboard.press(key)
        assert selected() == expected, key
        assert page.locator("#groups").get_attribute("aria-activedescendant") == f"g{expected}"


def test_model_text_stays_text(page):
    page.fill("#f-text", "needle")
    assert page.locator("#group img, #group script").count() == 0
    assert EVIL in page.locator("#group").inner_text()
    assert page.locator("script").count() == 2  # the data and the page's own


def test_dark_readers_get_dark_figures(browser, page_path):
    colours = []
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme, viewport={"width": 1280, "height": 900})
        page.goto(page_path.as_uri())
        colours.append(page.evaluate("[getComputedStyle(document.body).backgroundColor, getComputedStyle("
                                     "document.querySelector('figure svg text')).fill]"))  # fmt: skip
        page.close()
    light, dark = colours
    assert light[0] != dark[0] and light[1] != dark[1]

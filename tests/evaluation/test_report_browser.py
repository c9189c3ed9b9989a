"""The report in a browser, from a file and without a network: no errors, tables sort, slices scroll, NiiVue draws."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from lgssl_nnunet.evaluation.report.report import report

sys.path.insert(0, str(Path(__file__).parent))
from report_data import write_report_data

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
# WebGL is computed on the CPU; the browser itself must not call home either.
FLAGS = ["--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--disable-background-networking"]
PATIENCE = 120_000  # ms: a busy machine draws WebGL slowly

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium (apt-get install chromium)"),
]
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (extra test)")
pytest.importorskip("ipyniivue", reason="needs ipyniivue (extra viewer)")


@pytest.fixture(scope="module")
def report_file(tmp_path_factory):
    root = tmp_path_factory.mktemp("browser")
    data = write_report_data(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_raw", str(data["raw"].parent))
        return report(data["predictions"], output=root / "report.html", num_processes=0)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        no_sandbox = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        chromium = driver.chromium.launch(executable_path=BROWSER, args=[*FLAGS, *no_sandbox])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, report_file):
    """The report in a fresh tab; after the test, whatever the browser complained about or asked for fails it."""
    context = browser.new_context(viewport={"width": 1200, "height": 900}, offline=True)
    tab = context.new_page()
    tab.set_default_timeout(PATIENCE)
    complaints, requests = [], []
    tab.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(report_file.as_uri())
    yield tab
    context.close()
    assert complaints == []
    assert [url for url in requests if not url.startswith(("data:", "blob:", report_file.as_uri()))] == []


def column(page, name):
    """The texts of a column of the table of cases."""
    headings = page.locator("#case-table th").all_inner_texts()
    index = next(i for i, heading in enumerate(headings) if heading.strip().startswith(name))
    return [row.locator("td").nth(index).inner_text() for row in page.locator("#case-table tbody tr").all()]


def test_a_click_on_a_heading_sorts_and_a_second_one_turns_the_order(page):
    heading = page.locator("#case-table th button", has_text="Dice").first
    heading.click()
    assert column(page, "Dice") == ["0.0000", "0.6667", "1.0000", "-", "-", "-"]
    assert page.locator("#case-table th[aria-sort=ascending]").count() == 1
    heading.click()
    assert column(page, "Dice") == ["1.0000", "0.6667", "0.0000", "-", "-", "-"]
    page.locator("#case-table th button", has_text="Case").press("Enter")
    assert column(page, "Case") == ["a", "a", "b", "b", "c", "c"]


def test_the_slider_scrolls_through_the_slices(page):
    block = page.locator(".slices").first
    before = block.locator(".slice:visible > p").inner_text()
    block.locator("input[type=range]").press("Home")
    first = block.locator(".slice:visible > p").inner_text()
    assert first.startswith("Axial, slice 2 of 10")
    assert first != before
    block.locator("input[type=range]").press("ArrowRight")
    assert block.locator(".slice:visible > p").inner_text().startswith("Axial, slice 3 of 10")
    assert block.locator(".slice:visible img").count() == 4
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")


def test_the_viewer_draws_the_chosen_case_with_its_labels(page):
    page.locator(".open-viewer").nth(1).click()
    canvas = page.locator("#viewer-canvas[data-case]")
    canvas.wait_for()
    assert canvas.get_attribute("data-case") == page.locator("#cases h3").nth(1).inner_text().split()[0]
    page.locator("#viewer-layout").select_option("axial")
    with_labels = _colours(canvas)
    page.get_by_role("slider", name="prediction").fill("0")
    without_labels = _colours(canvas)
    assert with_labels["orange"] > 500
    assert without_labels["orange"] == 0
    assert without_labels["grey"] > 500
    page.locator("#viewer-layout").select_option("render")
    page.locator("#viewer-outline").check()
    page.locator("#viewer-case").select_option("0")
    page.wait_for_selector("#viewer-canvas[data-case=c]")


def test_a_narrow_screen_needs_no_sideways_scrolling(page):
    page.set_viewport_size({"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def _colours(canvas):
    """Count the pixels of a picture of the canvas that are orange (the first class) or grey (the image)."""
    import io

    import numpy as np
    from PIL import Image

    canvas.page.wait_for_timeout(500)
    picture = np.asarray(Image.open(io.BytesIO(canvas.screenshot())).convert("RGB")).astype(int)
    red, green, blue = picture[..., 0], picture[..., 1], picture[..., 2]
    grey = (abs(red - blue) < 8) & (red > 20) & (red < 250)
    return {"orange": int(((red - blue > 60) & (red > green)).sum()), "grey": int(grey.sum())}

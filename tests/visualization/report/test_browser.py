"""The report in a browser that has no network: what a reader sees, on desk, phone and paper."""

import re
import shutil

import pytest

from fcos_d2.engine.commands import record_command
from fcos_d2.visualization.report import write_report

pytestmark = pytest.mark.slow

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
_TITLES = (
    "Summary",
    "Training",
    "AP",
    "Precision and recall",
    "Confusion of classes",
    "AP lost by type of error",
    "Calibration and score thresholds",
    "Best, typical and worst images",
    "Assignment of locations",
    "Commands and configuration",
)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if path is None:
        pytest.skip(f"none of {', '.join(_BROWSERS)} is installed")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=_ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(make_run, shapes_source, hostile_source, tmp_path_factory):
    """The report of a run with two test sets, the second with names that look like HTML."""
    folder = make_run(tmp_path_factory.mktemp("page") / "a <u>run", [shapes_source, hostile_source])
    record_command(folder, ["train_net.py", "OUTPUT_DIR", "a <u>run"], "cpu")
    return write_report(folder)[-1]


@pytest.fixture(scope="module")
def visit(browser, report):
    """The report's page, what it asked for, and what the browser complained about."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True)
    page = context.new_page()
    requests, complaints = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(report.as_uri())
    yield page, requests, complaints
    context.close()


def test_nothing_is_asked_of_the_network(visit, report):
    page, requests, complaints = visit
    page.wait_for_load_state("networkidle")
    assert [url for url in requests if not url.startswith("data:")] == [report.as_uri()]
    assert complaints == []
    assert page.locator("script").count() == 0


def test_every_image_is_decoded_and_described(visit):
    page, *_ = visit
    images = page.evaluate(
        "Promise.all([...document.images].map(async image => {"
        " await image.decode().catch(() => null); return [image.naturalWidth, image.alt]; }))"
    )
    assert len(images) > 30
    assert all(width > 0 and alt for width, alt in images), images


def test_all_sections_are_there_and_in_the_contents(visit):
    page, *_ = visit
    titles = page.locator("h2, h3").all_inner_texts()
    positions = [titles.index(title) for title in _TITLES]
    assert positions == sorted(positions)
    assert len([title for title in titles if title.startswith("Results on voc:")]) == 2
    assert page.locator(".missing").count() == 0
    for link in page.locator("nav a").all():
        assert page.locator(f"[id='{link.get_attribute('href')[1:]}']").count() == 1


def test_names_are_text_and_no_html(visit):
    page, *_ = visit
    assert page.locator("#injected, u").count() == 0
    assert page.locator("h1").inner_text() == "a <u>run"
    assert page.get_by_text('<b id="injected">&"cat\'').count() > 3


@pytest.mark.parametrize("width", [320, 375, 768, 1280, 1920])
def test_no_horizontal_scrolling_of_the_page(visit, width):
    page, *_ = visit
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [width, width]


def test_the_config_opens_on_a_click(visit):
    page, *_ = visit
    text = page.locator("details pre")
    assert not text.is_visible()
    page.locator("summary").click()
    assert text.is_visible() and "META_ARCHITECTURE: FCOS" in text.inner_text()
    page.locator("summary").click()
    assert not text.is_visible()


@pytest.mark.parametrize("width", [375, 1280])
def test_a_click_opens_a_larger_view_and_another_closes_it(visit, width):
    page, *_ = visit
    page.set_viewport_size({"width": width, "height": 800})
    image = page.locator(".photo img").first
    small = image.bounding_box()
    page.locator(".photo .open").first.click()
    large = image.bounding_box()
    assert large["width"] > 1.3 * small["width"]
    frame = page.locator(".photo:target .frame").bounding_box()
    assert frame == {"x": 0, "y": 0, "width": width, "height": 800}  # over all else
    assert large["x"] >= 0 and large["x"] + large["width"] <= width
    assert large["y"] >= 0 and large["y"] + large["height"] <= 800
    page.locator(".photo:target .close").click()
    assert image.bounding_box()["width"] == pytest.approx(small["width"])


def test_it_prints_on_several_pages(visit):
    """Closed parts stay out, so the pages are far fewer than with the whole config."""
    page, *_ = visit
    pdf = page.pdf(prefer_css_page_size=True)
    sizes = re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", pdf)
    assert 1 < len(sizes) < 25
    assert {(round(float(w)), round(float(h))) for w, h in sizes} == {(595, 842)}  # A4, points

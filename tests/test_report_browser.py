"""The page in a browser: figures are drawn, a hover and a click say what they must, keys work, nothing is fetched."""

import shutil
from pathlib import Path

import pytest
from test_figures import whole

from wpmerge.report import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="there is no Chromium with its chromedriver")

CELLS = "#chart-scores-head-reference svg .mark-rect path, #chart-scores-head-reference svg .mark-rect rect"


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> str:
    from dataclasses import replace

    path = tmp_path_factory.mktemp("page") / "report.html"
    paths = {name: Path(name) for name in ("scores", "plan", "evaluation", "proof", "bench")}
    write_report(replace(whole(), paths=paths), out=path)
    return path.as_uri()


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = CHROMIUM
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=1400,1000",
        "--disable-dev-shm-usage",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


def opened(browser, url: str, *, dark: bool = False):
    from selenium.webdriver.support.ui import WebDriverWait

    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    browser.get(url)
    WebDriverWait(browser, 60).until(lambda each: each.execute_script("return document.documentElement.dataset.ready"))
    return browser


def panel(browser) -> str:
    return browser.find_element("id", "unit").text


def test_everything_is_drawn_without_a_word_in_the_console_or_a_request(browser, url):
    opened(browser, url)
    charts = browser.find_elements("css selector", "figure .chart")
    assert len(charts) >= 9
    for chart in charts:
        assert chart.get_attribute("data-drawn") == "true", chart.text
        assert chart.find_elements("css selector", "svg .mark-rect, svg .mark-symbol, svg .mark-line, svg .mark-text")
    assert len(browser.find_elements("css selector", CELLS)) >= 64
    log = [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    assert not log, log
    fetched = browser.execute_script("return performance.getEntriesByType('resource').map((each) => each.name)")
    assert [each for each in fetched if not each.startswith(("data:", "blob:"))] == []
    assert browser.execute_script("return document.title") == "wpmerge: a, b"
    assert not browser.find_elements("css selector", "img[src=x]")


def test_a_hover_says_unit_score_certainty_and_interval(browser, url):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.support.ui import WebDriverWait

    opened(browser, url)
    cell = browser.find_elements("css selector", CELLS)[0]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", cell)
    ActionChains(browser).move_to_element(cell).perform()
    tip = "#vg-tooltip-element.visible"
    WebDriverWait(browser, 10).until(lambda each: each.find_elements("css selector", tip))
    said = browser.find_element("css selector", tip).text
    for name in (
        "unit",
        "head.0.0",
        "score (linear)",
        "how known",
        "verified",
        "exact",
        "interval from",
        "interval to",
    ):
        assert name in said, said


def test_a_click_opens_the_unit_in_every_map(browser, url):
    from selenium.webdriver.common.action_chains import ActionChains

    opened(browser, url)
    cell = browser.find_elements("css selector", CELLS)[5]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", cell)
    ActionChains(browser).move_to_element(cell).click().perform()
    said = panel(browser)
    assert said.startswith("head.1.1"), said
    for name in ("a@anchor", "b@anchor", "plain", "Nearest rivals", "Coefficients of the merge", "rank"):
        assert name in said, said
    rival = browser.find_element("css selector", "#unit button")
    name = rival.text
    rival.click()
    assert panel(browser).startswith(name)


def test_every_unit_of_a_large_model_opens(browser, tmp_path):
    from dataclasses import replace

    material = whole(layers=12, heads=4, neurons=700, names=("a", "b"))
    paths = {name: Path(name) for name in ("scores", "plan", "evaluation", "proof", "bench")}
    made = write_report(replace(material, paths=paths), out=tmp_path / "large.html")
    assert made["bytes"] < 5_000_000
    opened(browser, (tmp_path / "large.html").as_uri())
    browser.execute_script("document.getElementById('pick-kind').value = 'neuron'")
    layer, index = (browser.find_element("id", f"pick-{name}") for name in ("layer", "index"))
    layer.clear()
    layer.send_keys("11")
    index.clear()
    index.send_keys("699")
    said = panel(browser)
    assert said.startswith("neuron.11.699"), said
    value = float(material.scores.array("a", "b", "neuron")[11, 699])
    assert f"{float(f'{value:.3g}'):g}" in said and "rank" in said and "Coefficients of the merge" in said, said
    assert "In the same cell" in said and "has room for" not in said
    button = browser.find_element("css selector", "#unit h4 + p button")
    name = button.text
    button.send_keys("\n")
    assert panel(browser).startswith(name)


def test_keys_reach_units(browser, url):
    from selenium.webdriver.common.keys import Keys

    opened(browser, url)
    chart = browser.find_element("id", "chart-scores-head-reference")
    browser.execute_script("arguments[0].focus()", chart)
    layer = browser.find_element("id", "pick-layer")
    index = browser.find_element("id", "pick-index")
    browser.execute_script(
        "const [kind, layer, index] = arguments; kind.value = 'head'; layer.value = 1; index.value = 1;"
        "layer.dispatchEvent(new Event('input', {bubbles: true}))",
        browser.find_element("id", "pick-kind"), layer, index,
    )  # fmt: skip
    assert panel(browser).startswith("head.1.1")
    chart.send_keys(Keys.ARROW_RIGHT)
    assert panel(browser).startswith("head.2.1")
    chart.send_keys(Keys.ARROW_DOWN)
    assert panel(browser).startswith("head.2.2")
    chart.send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert panel(browser).startswith("head.0.2")  # the edge holds
    layer.send_keys(Keys.ARROW_UP)
    assert panel(browser).startswith("head.1.2")
    assert (
        chart.get_attribute("aria-label") and browser.find_element("id", "unit").get_attribute("aria-live") == "polite"
    )
    outline = browser.execute_script("arguments[0].focus(); return getComputedStyle(arguments[0]).outlineStyle", layer)
    assert outline != "none"


def test_a_unit_that_the_readout_cannot_see_is_not_0(browser, url):
    opened(browser, url)
    browser.execute_script("document.getElementById('scores-head-anchor').open = true")
    from selenium.webdriver.support.ui import WebDriverWait

    chart = browser.find_element("id", "chart-scores-head-anchor")
    WebDriverWait(browser, 20).until(lambda _: chart.get_attribute("data-drawn"))
    assert len(chart.find_elements("css selector", "svg .mark-symbol path")) >= 32  # hatched: two layers, four maps
    cells = chart.find_elements("css selector", "svg .mark-rect path")
    assert len(cells) >= 32


def test_dark_mode(browser, url):
    opened(browser, url, dark=True)
    background = "return getComputedStyle(document.body).backgroundColor"
    assert browser.execute_script(background) == "rgb(13, 17, 23)"
    fill = browser.find_element("css selector", "#chart-anchors svg .role-axis-title text").get_attribute("fill")
    assert fill == "#e6edf3"
    opened(browser, url)
    assert browser.execute_script(background) == "rgb(255, 255, 255)"


def test_a_narrow_page_scrolls_figures_and_not_itself(browser, url):
    size = browser.get_window_size()
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 420, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    )
    opened(browser, url)
    wide = browser.execute_script("return document.documentElement.scrollWidth - document.documentElement.clientWidth")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.set_window_size(size["width"], size["height"])
    assert wide <= 0


def test_it_prints(browser, url):
    import base64

    opened(browser, url)
    made = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"])
    assert made.startswith(b"%PDF") and len(made) > 20_000

"""Reports in a browser: `make browser-test`. Screenshots are left in build/report/."""

from __future__ import annotations

import base64
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from reports import Made
from repository import ROOT
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

from flatmin.report import page

AXE = ROOT / ".venv/axe/node_modules/axe-core/axe.min.js"
SCREENSHOTS = ROOT / "build/report"
TALLEST = 8000  # pixels of a screenshot
FEW = [str(number) for number in range(10)]
MANY = [f"a_class_with_a_name_that_does_not_break_number_{number}" for number in range(300)]
STUDIES: dict[str, dict[str, Any]] = {
    "few": {"names": FEW, "images": 500, "duplicates": 3, "near": 8, "limits": (24, 10, 4, 30, 3), "noise": True},
    "many": {"names": MANY, "images": 5000, "limits": (4, 3, 2, 30, 3)},
    "unlabelled": {"names": FEW, "labelled": False, "seeds": (7,)},
}

# Pictures load when they are scrolled to; decoding one that is broken fails.
BROKEN = """
const done = arguments[0];
document.querySelectorAll("img").forEach(each => each.loading = "eager");
Promise.all([...document.images].map(each => each.decode().then(() => null, () => each.alt)))
    .then(found => done(found.filter(each => each !== null)));
"""
# The alternative texts of pictures that cover the one before them in their row of a table.
OVERLAPPING = """
return [...document.querySelectorAll("tr")].flatMap(row => [...row.querySelectorAll("img")].filter((each, index, all) =>
    index && each.getBoundingClientRect().left < all[index - 1].getBoundingClientRect().right)).map(each => each.alt);
"""
# The first cells of rows, which stay where they are while a table is scrolled, and leave no room for the others.
COVERING = """
return [...document.querySelectorAll(".scroll tbody th")].map(each => each.getBoundingClientRect().width)
    .filter(width => width > innerWidth / 2);
"""
VIOLATIONS = """
const done = arguments[0];
axe.run().then(found => done(found.violations.map(each => `${each.id}: ${each.nodes[0].html}`)));
"""


@pytest.fixture(scope="module", params=STUDIES)
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The name of a study and its report."""
    folder = tmp_path_factory.mktemp(request.param)
    page.write(Made(folder, **STUDIES[request.param]).study(), folder / "index.html")
    return request.param, folder / "index.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "hide-scrollbars"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options, Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def emulate(browser: Chrome, width: int, scheme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)


def screenshot(browser: Chrome, path: Path, width: int) -> None:
    height = min(TALLEST, browser.execute_script("return document.documentElement.scrollHeight"))
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    taken = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(base64.b64decode(taken["data"]))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1440])
def test_report_is_readable_in_a_browser(browser: Chrome, report: tuple[str, Path], width: int, scheme: str) -> None:
    name, path = report
    emulate(browser, width, scheme)
    browser.get(path.as_uri())
    assert browser.get_log("browser") == []
    assert browser.execute_async_script(BROKEN) == []
    requested = browser.execute_script("return performance.getEntriesByType('resource').map(each => each.name)")
    assert [url for url in requested if not url.startswith("data:")] == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script(OVERLAPPING) == []
    assert browser.execute_script(COVERING) == []
    screenshot(browser, SCREENSHOTS / f"{name}-{width}-{scheme}.png", width)
    browser.execute_script(AXE.read_text(encoding="utf-8"))
    assert browser.execute_async_script(VIOLATIONS) == []
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    red = int(re.findall(r"\d+", background)[0])
    assert red > 200 if scheme == "light" else red < 60


def test_report_prints_on_a4(browser: Chrome, report: tuple[str, Path]) -> None:
    emulate(browser, 1440, "dark")
    browser.get(report[1].as_uri())
    printed = browser.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True, "printBackground": True})
    boxes = set(re.findall(rb"/MediaBox \[0 0 (\d+)[\d.]* (\d+)", base64.b64decode(printed["data"])))
    assert boxes == {(b"594", b"841")} or boxes == {(b"595", b"842")}

"""The page as people meet it: in a browser, on a laptop and on a phone."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="no Chromium; `apt-get install chromium` has one"),
    pytest.mark.skipif(DRIVER is None, reason="no chromedriver; `apt-get install chromium-driver` has one"),
]

SIZES = {"laptop": (1440, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(params=SIZES)
def size(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def opened(browser: Any, size: str, full_page: str, tmp_path: Path) -> Any:
    """The browser with the page, whose images have got their buttons."""
    file = tmp_path / "report.html"
    file.write_text(full_page, encoding="utf-8")
    width, height = SIZES[size]
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone"}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    for log in ("browser", "performance"):
        browser.get_log(log)  # what an earlier page left
    browser.get(file.as_uri())
    count = "return document.querySelectorAll('.frames button').length"
    wait_until(lambda: browser.execute_script(count) == 4 * 7)  # six rows, the float model's twice
    return browser


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end, "nothing happened within five seconds"
        time.sleep(0.02)


def test_the_page_loads_without_errors_or_network(opened: Any) -> None:
    assert opened.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    asked = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert sum(url.startswith("file:") for url in asked) == 1


def test_the_body_is_no_wider_than_the_window(opened: Any, size: str) -> None:
    script = "return [innerWidth, document.documentElement.scrollWidth, document.body.scrollWidth]"
    assert opened.execute_script(script) == [SIZES[size][0]] * 3


def test_plots_are_there_and_not_empty(opened: Any) -> None:
    plots = opened.execute_script(
        "return [...document.querySelectorAll('svg')].map(svg => [svg.getBoundingClientRect().height, "
        "svg.querySelectorAll('path').length, svg.querySelectorAll('text').length])"
    )
    assert len(plots) == 4
    assert all(height > 100 and paths > 10 and texts > 5 for height, paths, texts in plots)


def test_a_plot_takes_the_colours_of_the_page(opened: Any) -> None:
    def color(scheme: str) -> str:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        return str(opened.execute_script("return getComputedStyle(document.querySelector('svg text')).fill"))

    assert color("light") != color("dark")


@pytest.mark.parametrize("table", [0, 1])
def test_every_column_sorts_and_turns_round(opened: Any, table: int) -> None:
    heads = opened.execute_script(
        f"return document.querySelectorAll('.sortable')[{table}].tHead.rows[0].cells"
    )
    for column, head in enumerate(heads):
        head.find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)
        assert head.get_attribute("aria-sort") == "ascending"
        up = keys(opened, table, column)
        assert up == sorted(up)
        head.find_element(By.TAG_NAME, "button").send_keys(Keys.SPACE)
        assert head.get_attribute("aria-sort") == "descending"
        down = keys(opened, table, column)
        assert down == sorted(down, reverse=True)
        assert up != down
    assert sum(head.get_attribute("aria-sort") is not None for head in heads) == 1


def keys(driver: Any, table: int, column: int) -> list[float]:
    """What a column is sorted by, from top to bottom; rows without a number must come last."""
    cells = driver.execute_script(
        f"return [...document.querySelectorAll('.sortable')[{table}].tBodies[0].rows]"
        f".map(row => row.cells[{column}].dataset.sort)"
    )
    known = [cell for cell in cells if cell]
    assert cells == known + [""] * (len(cells) - len(known))
    return [float(cell) for cell in known]


def test_the_switch_hides_and_shows_compute_matched_rows(opened: Any, size: str) -> None:
    switch = opened.find_element(By.CSS_SELECTOR, "input[role=switch]")
    rows = opened.find_elements(By.CSS_SELECTOR, ".alternative")
    assert len(rows) == 7  # two in each table, a strip, and the float model's group of another
    assert {row.is_displayed() for row in rows} == {size == "laptop"}
    for _ in range(2):
        shown = switch.is_selected()
        switch.send_keys(Keys.SPACE)
        assert {row.is_displayed() for row in rows} == {not shown}
        everywhere = opened.find_elements(By.CSS_SELECTOR, "input[role=switch]")
        assert {each.is_selected() for each in everywhere} == {not shown}


def button(driver: Any, label: str) -> Any:
    return driver.find_element(By.CSS_SELECTOR, f'.frames button[aria-label="Enlarge {label}"]')


def is_open(driver: Any) -> bool:
    return bool(driver.execute_script("return document.getElementById('zoom').open"))


def pictures(driver: Any) -> list[list[int]]:
    """Red, green and blue of every pixel of the three pictures."""
    return driver.execute_script(  # type: ignore[no-any-return]
        "return [...document.querySelectorAll('#zoom canvas')].map(canvas => {"
        "const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;"
        "return [...data].filter((_, i) => i % 4 < 3); })"
    )


def title(driver: Any) -> str:
    return str(driver.find_element(By.ID, "zoom-title").text)


def press(driver: Any, key: str) -> None:
    driver.switch_to.active_element.send_keys(key)


def test_a_click_shows_an_image_the_float_models_and_their_difference(opened: Any) -> None:
    button(opened, "w8a8, ends, seed 7").click()
    assert is_open(opened)
    assert title(opened) == "w8a8, ends · seed 7"
    mine, other, difference = pictures(opened)
    assert len(mine) == len(other) == len(difference) == 16 * 16 * 3
    assert difference == [min(255, 4 * abs(a - b)) for a, b in zip(mine, other, strict=True)]
    assert max(difference) > 0
    opened.execute_script(
        "const gain = document.getElementById('zoom-gain');"
        "gain.value = 1; gain.dispatchEvent(new Event('input'))"
    )
    assert pictures(opened)[2] == [abs(a - b) for a, b in zip(mine, other, strict=True)]
    opened.find_element(By.CSS_SELECTOR, "#zoom .close").click()
    assert not is_open(opened)


def test_an_image_beside_itself_differs_nowhere(opened: Any) -> None:
    button(opened, "float model, seed 5").click()
    mine, other, difference = pictures(opened)
    assert mine == other
    assert max(difference) == 0


def test_keys_open_move_and_close(opened: Any) -> None:
    opened.execute_script("arguments[0].focus()", button(opened, "w8a8, ends, seed 5"))
    press(opened, Keys.ARROW_RIGHT)
    press(opened, Keys.ENTER)
    assert (is_open(opened), title(opened)) == (True, "w8a8, ends · seed 6")
    first = pictures(opened)
    press(opened, Keys.ARROW_RIGHT)
    assert title(opened) == "w8a8, ends · seed 7"
    assert all(was != now for was, now in zip(first, pictures(opened), strict=True))
    press(opened, Keys.ARROW_UP)
    assert title(opened) == "w8a8, uncorrected · seed 7"
    for _ in range(5):
        press(opened, Keys.ARROW_LEFT)
    assert title(opened) == "w8a8, uncorrected · seed 5"
    press(opened, Keys.ESCAPE)
    assert not is_open(opened)
    # The dialog gives the focus back in an event of its own, a little later.
    wanted = "Enlarge w8a8, uncorrected, seed 5"
    wait_until(lambda: opened.switch_to.active_element.get_attribute("aria-label") == wanted)

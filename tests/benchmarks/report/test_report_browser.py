"""The report in Chromium: sorting, filters, themes, provenance, small screens, accessible names.

Nothing is loaded from elsewhere, and no script but the page's own runs.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import pytest
import report_fakes
from test_report_parts import write_hostile

pytestmark = pytest.mark.slow
GRID = report_fakes.report_grid()
MAIN = "section[data-task='classification'] table.main-table"


@pytest.fixture(scope="module")
def page_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    report_fakes.write_results(folder, GRID)
    return report_fakes.write_page(folder, GRID)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with browser.chromium(tmp_path_factory.mktemp("chromium")) as started:
        yield started


@pytest.fixture
def page(driver: Any, page_path: Path) -> Any:
    """The page as it opens, at a usual size, without the choices of earlier tests."""
    return opened(driver, page_path)


def opened(driver: Any, path: Path, width: int = 1200) -> Any:
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": "light"}]},
    )
    driver.get("about:blank")
    for kind in ("browser", "performance"):
        driver.get_log(kind)
    driver.get(path.as_uri())
    driver.execute_script("localStorage.clear()")
    driver.refresh()
    return driver


def all_of(page: Any, css: str) -> list[Any]:
    found: list[Any] = page.find_elements("css selector", css)
    return found


def one_of(page: Any, css: str) -> Any:
    return page.find_element("css selector", css)


def column(page: Any, index: int) -> list[float]:
    script = "return [...document.querySelectorAll(arguments[0])].map(c => Number(c.dataset.value))"
    found: list[float] = page.execute_script(script, f"{MAIN} tbody td:nth-child({index + 1})")
    return found


def methods(page: Any) -> list[str]:
    script = """return [...document.querySelectorAll(arguments[0])]
        .filter(row => row.offsetParent).map(row => row.dataset.method)"""
    found: list[str] = page.execute_script(script, f"{MAIN} tbody tr")
    return found


def visible(page: Any, css: str) -> list[Any]:
    return [found for found in all_of(page, css) if found.is_displayed()]


def test_tables_sort_by_click_and_state_the_order(page: Any):
    original = methods(page)
    head = all_of(page, f"{MAIN} thead tr:last-child th")[1]  # the first model at its second bits
    assert head.get_attribute("aria-sort") == "none"
    one = head.find_element("css selector", "button")
    one.click()
    assert head.get_attribute("aria-sort") == "descending"
    values = column(page, 2)
    assert values == sorted(values, reverse=True)
    assert methods(page) != original
    one.click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert column(page, 2) == sorted(values)
    one.click()
    assert head.get_attribute("aria-sort") == "none"
    assert methods(page) == original
    one_of(page, f"{MAIN} thead .first button").click()
    assert methods(page) == sorted(original)


def test_tables_sort_by_keyboard(page: Any):
    from selenium.webdriver.common.keys import Keys

    button = one_of(page, f"{MAIN} thead tr:last-child th button")
    page.execute_script("arguments[0].focus()", button)
    outline = page.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
    page.switch_to.active_element.send_keys(Keys.SPACE)
    values = column(page, 1)
    assert values == sorted(values, reverse=True)
    page.switch_to.active_element.send_keys(Keys.ENTER)
    assert column(page, 1) == sorted(values)
    page.switch_to.active_element.send_keys(Keys.TAB)
    after = page.switch_to.active_element
    assert after.accessible_name == "demo_vit w3a3"
    assert (
        page.execute_script("return getComputedStyle(arguments[0]).outlineStyle", after) == "solid"
    )
    assert outline in ("solid", "none")


def test_missing_values_sort_last_in_both_orders(driver: Any, tmp_path: Path):
    report_fakes.write_results(
        tmp_path,
        GRID,
        examples=None,
        keep=lambda cell: (cell.method, cell.model, cell.bits) != ("brecq", "demo_vit", "w4a4"),
    )
    page = opened(driver, report_fakes.write_page(tmp_path, GRID))
    for _ in range(2):
        one_of(page, f"{MAIN} thead tr:last-child th button").click()
        assert methods(page)[-1] == "brecq"


def test_filters_apply_to_all_parts(page: Any):
    from selenium.webdriver.support.ui import Select

    method = one_of(page, "input[name=method]")
    method.send_keys("FIMA, rtn")
    assert methods(page) == ["rtn", "fimaq"]
    assert {node.get_attribute("data-method") for node in visible(page, "#cost g.series")} == {
        "rtn",
        "fimaq",
    }
    assert {node.text for node in visible(page, "#bits .legend li")} == {"rtn", "fimaq"}
    assert one_of(page, ".filters output").text == "6 of 15 rows of results"
    heads = visible(page, "#examples thead th[data-method-column]")
    assert {head.text for head in heads} == {"full precision", "rtn", "fimaq"}
    Select(one_of(page, "select[name=bits]")).select_by_visible_text("w3a3")
    assert [
        head.get_attribute("data-bits") for head in visible(page, f"{MAIN} thead tr:last-child th")
    ] == ["w3a3", "w3a3"]
    assert [group.get_attribute("colspan") for group in visible(page, f"{MAIN} th.group")] == [
        "1",
        "1",
    ]
    assert {node.get_attribute("data-bits") for node in visible(page, "#cost figure")} == {"w3a3"}
    Select(one_of(page, "select[name=model]")).select_by_visible_text("demo_clip [both]")
    assert {node.get_attribute("data-task") for node in visible(page, "section.task")} == {
        "retrieval"
    }
    one_of(page, ".filters button[type=reset]").click()
    page.execute_async_script("setTimeout(arguments[0], 20)")
    assert len(methods(page)) == 5
    assert len(visible(page, "#cost figure")) == 10
    Select(one_of(page, "select[name=task]")).select_by_visible_text("detection")
    assert {node.get_attribute("data-task") for node in visible(page, "section.task")} == {
        "detection"
    }


def test_a_click_on_a_number_shows_its_provenance(page: Any):
    from selenium.webdriver.common.keys import Keys

    link = one_of(page, f"{MAIN} tr[data-method=fimaq] a.origin")
    page.execute_script("arguments[0].focus()", link)
    page.switch_to.active_element.send_keys(Keys.ENTER)
    dialog = one_of(page, "dialog")
    assert dialog.get_attribute("open") is not None
    assert dialog.accessible_name == "demo_vit fimaq w4a4"
    for words in (
        "sha256",
        "git revision",
        "recipe digest",
        "runs/classification/demo_vit/fimaq/w4a4/",
        "seed 2 ± se",
    ):
        assert words in dialog.text
    assert page.execute_script(
        "return document.querySelector('dialog').contains(document.activeElement)"
    )
    page.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not dialog.is_displayed()
    assert page.switch_to.active_element == link
    link.click()
    one_of(page, "dialog .close").click()
    assert not dialog.is_displayed()
    ids = page.execute_script("return [...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))


def test_themes_follow_the_system_and_the_switch(page: Any, page_path: Path):
    def background() -> str:
        return str(page.execute_script("return getComputedStyle(document.body).backgroundColor"))

    def pressed() -> list[str]:
        return [
            button.text
            for button in all_of(page, "[data-theme-choice]")
            if button.get_attribute("aria-pressed") == "true"
        ]

    light = background()
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": "dark"}]},
    )
    dark = background()
    assert dark != light
    assert pressed() == ["system"]
    one_of(page, "[data-theme-choice=light]").click()
    assert (background(), pressed()) == (light, ["light"])
    page.refresh()
    assert (background(), pressed()) == (light, ["light"])  # it is remembered
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": "light"}]},
    )
    one_of(page, "[data-theme-choice=dark]").click()
    assert background() == dark
    one_of(page, "[data-theme-choice=system]").click()
    assert background() == light


def test_colours_have_contrast_in_both_themes(page: Any):
    script = """
    const probe = document.body.appendChild(document.createElement('i')), found = {};
    for (const name of ['bg', 'card', 'soft', 'text', 'muted', 'accent', 'good', 'bad', 'warn',
                        'c0', 'c1', 'c2', 'c3', 'c4', 'c5', 'c6', 'c7']) {
      probe.style.color = `var(--${name})`;
      found[name] = getComputedStyle(probe).color.match(/\\d+/g).map(Number);
    }
    probe.remove();
    return found;"""

    def luminance(colour: list[int]) -> float:
        parts = [part / 255 for part in colour]
        return float(
            sum(
                share * (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4)
                for share, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True)
            )
        )

    for theme in ("light", "dark"):
        one_of(page, f"[data-theme-choice={theme}]").click()
        colours = page.execute_script(script)
        for name, ground in itertools.product(colours, ("bg", "card", "soft")):
            if name in ("bg", "card", "soft"):
                continue
            high, low = sorted((luminance(colours[name]), luminance(colours[ground])), reverse=True)
            least = 3.0 if name.startswith("c") and name != "card" else 4.5  # marks of charts; text
            assert (high + 0.05) / (low + 0.05) >= least, (theme, name, ground)


@pytest.mark.parametrize("width", [360, 800, 1400])
def test_the_page_is_no_wider_than_the_screen(driver: Any, page_path: Path, width: int):
    page = opened(driver, page_path, width)
    page.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    out = """return [...document.querySelectorAll('body *')]
        .filter(e => !e.closest('.scroll') && !e.closest('svg') && e.getClientRects().length)
        .filter(e => e.getBoundingClientRect().right > innerWidth + 1)
        .map(e => e.outerHTML.slice(0, 80))"""
    assert page.execute_script(out) == []
    # Each scrolling region can be reached by keyboard and has a name.
    for region in all_of(page, ".scroll"):
        assert region.get_attribute("tabindex") == "0"
        assert region.get_attribute("aria-label")


def test_everything_interactive_has_a_name(page: Any):
    page.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    nodes = page.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    seen: dict[str, int] = {}
    wanted = (
        "button", "link", "combobox", "searchbox", "textbox", "checkbox", "DisclosureTriangle",
        "region", "search", "navigation", "img", "image", "table", "group",
    )  # fmt: skip
    for node in nodes:
        role = node.get("role", {}).get("value")
        if node.get("ignored") or role not in wanted:
            continue
        seen[role] = seen.get(role, 0) + 1
        if role not in ("group", "table"):
            assert node.get("name", {}).get("value"), node
    assert seen["link"] > 50
    assert seen["button"] > 10
    assert seen["navigation"] == 1
    assert seen["search"] == 1
    assert seen.get("DisclosureTriangle", 0) > 40


def test_nothing_is_loaded_and_the_console_is_empty(driver: Any, page_path: Path):
    page = opened(driver, page_path)
    one_of(page, f"{MAIN} a.origin").click()
    requests = [
        message["params"]["request"]["url"]
        for entry in page.get_log("performance")
        if (message := json.loads(entry["message"])["message"])["method"]
        == "Network.requestWillBeSent"
    ]
    assert page_path.as_uri() in requests
    assert {url for url in requests if not url.startswith("data:")} == {page_path.as_uri()}
    assert page.get_log("browser") == []


def test_pictures_are_drawn(page: Any):
    board = one_of(page, "details.board svg.pic")
    page.execute_script("arguments[0].scrollIntoView()", board)
    assert board.size["width"] > 20
    used = page.execute_script(
        "const r = arguments[0].querySelector('use').getBBox(); return [r.width, r.height]", board
    )
    assert used == [64, 48]


def test_attacks_in_records_are_text(driver: Any, tmp_path: Path):
    page = opened(driver, write_hostile(tmp_path))
    page.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    for link in all_of(page, "a.origin")[:3]:
        page.execute_script("arguments[0].click()", link)
        assert one_of(page, "dialog").is_displayed()
        one_of(page, "dialog .close").click()
    assert page.execute_script("return window.hacked === undefined")
    assert page.execute_script("return document.scripts.length") == 1
    assert page.get_log("browser") == []
    assert "<script>window.hacked=1</script>" in page.execute_script(
        "return document.body.innerText"
    )
    # If an attack got into the page, the policy would keep it from running.
    attacks = """
    const script = document.createElement('script'), other = document.createElement('div');
    script.textContent = 'window.hacked = 9';
    other.innerHTML = '<img src=x onerror="window.hacked=8">';
    document.body.append(script, other);"""
    page.execute_script(attacks)
    page.execute_async_script("setTimeout(arguments[0], 100)")
    assert page.execute_script("return window.hacked === undefined")


def test_without_script_numbers_still_lead_to_their_provenance(driver: Any, page_path: Path):
    driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        driver.get("about:blank")
        driver.get(page_path.as_uri())
        assert not one_of(driver, ".filters").is_displayed()
        link = one_of(driver, f"{MAIN} tr[data-method=fimaq] a.origin")
        link.click()
        target = one_of(driver, link.get_dom_attribute("href"))
        assert target.is_displayed()
        assert "sha256" in target.text
        assert not all_of(driver, "th button")
    finally:
        driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})

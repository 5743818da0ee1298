"""The page as a reader has it: in a real browser, from the file."""

import json
import shutil

import made
import pytest

from mtl_jax import reporting

playwright = pytest.importorskip("playwright.sync_api")
PHONE, DESKTOP = (390, 844), (1280, 800)


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium that is installed; without one the tests are skipped."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if found is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, ablation):
    """Opens the page; at the end, nothing was said on the console and nothing was asked for but the file."""
    said, asked, contexts = [], [], []

    def visit(size=DESKTOP, scheme="light", path=ablation / "report.html"):
        contexts.append(browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        return page

    yield visit
    for context in contexts:
        context.close()
    assert said == []
    assert len(asked) == len(contexts)
    assert all(url.startswith("file://") for url in asked)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP, (360, 640)])
def test_figures_fit_and_can_be_read(visit, size, scheme):
    page = visit(size, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    boxes = page.evaluate("[...document.querySelectorAll('.panel svg')].map(s => s.getBoundingClientRect().toJSON())")
    assert len(boxes) == 20
    for box in boxes:
        assert box["width"] > 240
        assert box["height"] > 60
        assert box["left"] >= 0
        assert box["right"] <= size[0]
    texts = page.evaluate(
        "[...document.querySelectorAll('.panel svg text')].map(t => [t.textContent, t.getBoundingClientRect().height])"
    )
    assert {"step", "weight of tweets", "tweets pearson"} <= {text for text, _ in texts}
    assert min(height for text, height in texts if text.strip()) >= 9  # CSS pixels of a line
    cut = "[...document.querySelectorAll('.scroll, pre')].filter(e => e.scrollWidth > e.clientWidth).map(e => e.textContent)"
    assert page.evaluate(cut) == []  # neither of a table nor of the command


@pytest.fixture(scope="module")
def long_names(tmp_path_factory):
    """A report on two settings of six tasks, each with six weights."""
    tasks = {f"task_{n}_of_a_suite_of_many": "macro_f1" for n in range(6)}
    found = made.entries(points=(), methods=("equal",), tasks=tuple(tasks), rates=(1e-3, 3e-3), seeds=(0,))
    for entry in found:
        entry["values"] |= {"weights": dict.fromkeys(tasks, 0.125 + int(entry["run"])), "trunk.dropout": int(entry["run"]) / 10}
    folder = made.write_ablation(tmp_path_factory.mktemp("long"), found, tasks, steps=2, name=60 * "x")
    return reporting.write(folder, folder)


@pytest.mark.parametrize("width", [1280, 600, 400, 360])
def test_long_names_do_not_cut_the_page(visit, long_names, width):
    """Where a table has more columns than a screen can show, its region scrolls, and says so with a shadow."""
    page = visit((width, 800), path=long_names)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    last = page.evaluate("[...document.querySelector('#tried tbody tr').cells].at(-1).getBoundingClientRect().toJSON()")
    assert 0 < last["left"] < last["right"] <= width  # how long each run took
    for region in page.query_selector_all(".scroll"):
        wide = region.evaluate("e => e.scrollWidth - e.clientWidth")
        assert wide <= 0 or width > 600
        assert region.evaluate("e => getComputedStyle(e).overflowX") == "auto"
        assert "local" in region.evaluate("e => getComputedStyle(e).backgroundAttachment")


def test_curves_that_hide_each_other_are_all_seen(visit, tmp_path):
    """Equal curves are dashed in turns; equal curves of one point are rings; both are named below the panel."""
    for name in ("equal", "cagrad", "pcgrad"):
        made.write_run(tmp_path / name, {"values": {"weighting": name}, "status": "done"}, {"a": "accuracy"}, steps=12)
        record = {f"{kind}/a": 1.0 for kind in ("loss", "weight")} | {"kind": "train", "phase": 0}
        lines = [record | {"step": step, "loss/a": 1 / step} for step in range(1, 10)]
        lines.append({"kind": "dev", "step": 9, "a/accuracy": 0.5, "phase": 0})
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = visit(path=reporting.write([tmp_path / name for name in ("equal", "cagrad", "pcgrad")], tmp_path / "report"))
    for section in ("learning", "loss"):
        assert page.locator(f"#{section} .panel .note").text_content() == "On one line: equal, cagrad, pcgrad."
    strokes = (
        "[...document.querySelectorAll('#loss .panel path')]"
        ".map(p => [p.style.stroke, p.style.strokeDasharray, p.style.strokeDashoffset])"
    )
    dashed = [found for found in page.evaluate(strokes) if found[0].startswith("var(--s")]
    assert len({color for color, _, _ in dashed}) == len({offset for _, _, offset in dashed}) == 3
    assert len({dashes for _, dashes, _ in dashed}) == 1
    points = page.evaluate("[...document.querySelectorAll('#learning .panel use')].map(u => u.getBoundingClientRect().width)")
    assert len(set(points[-3:])) == 3  # CSS pixels


def test_light_and_dark_differ_and_have_contrast(visit):
    def luminance(rgb):
        channels = [int(part) / 255 for part in rgb.removeprefix("rgb(").removesuffix(")").split(",")]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    backgrounds = []
    for scheme in ("light", "dark"):
        page = visit(scheme=scheme)
        look = "e => getComputedStyle(document.querySelector(e[0]))[e[1]]"
        background = luminance(page.evaluate(look, ["section", "backgroundColor"]))
        backgrounds.append(background)
        marks = ["rgb" + page.evaluate(look, [f"ul.legend li:nth-child({n}) path", "stroke"])[3:] for n in (1, 2, 3)]
        inks = [page.evaluate(look, [".panel svg text", "fill"]), page.evaluate(look, ["figcaption", "color"])]
        for color, least in [(mark, 3.0) for mark in marks] + [(ink, 4.5) for ink in inks]:  # of WCAG 2
            high, low = sorted([luminance(color), background], reverse=True)
            assert (high + 0.05) / (low + 0.05) >= least, (scheme, color)
    assert backgrounds[0] > 0.9 > 0.05 > backgrounds[1]


def test_a_table_sorts_when_its_heading_is_pressed(visit):
    page = visit(PHONE)
    column = "[...document.querySelectorAll('#settings tbody tr')].map(row => row.cells[5].dataset.v)"
    heading = page.locator("#settings th:nth-child(6)")
    assert "tweets" in heading.text_content()
    before = page.evaluate(column)
    assert heading.get_attribute("aria-sort") is None
    heading.locator("button").click()
    assert heading.get_attribute("aria-sort") == "descending"
    values = [float(value) for value in page.evaluate(column)]
    assert values == sorted(map(float, before), reverse=True) != list(map(float, before))
    heading.locator("button").focus()
    page.keyboard.press("Enter")
    assert heading.get_attribute("aria-sort") == "ascending"
    assert [float(value) for value in page.evaluate(column)] == values[::-1]
    weight = page.locator("#settings th:nth-child(2)")  # which methods do not have: these stay below
    for order in ("descending", "ascending"):
        weight.locator("button").click()
        assert weight.get_attribute("aria-sort") == order
        assert page.evaluate("[...document.querySelectorAll('#settings tbody tr')].map(row => row.cells[1].dataset.v)")[
            -2:
        ] == ["", ""]
    assert page.locator("[aria-sort]").count() == 1


def test_of_many_pairs_one_is_chosen(visit, tmp_path):
    tasks = dict.fromkeys(("a", "b", "c", "d"), "accuracy")
    folders = []
    for number, method in enumerate(("equal", "pcgrad", "cagrad")):
        entry = {"values": {"weighting": method, "seed": number}, "status": "done"}
        folders.append(made.write_run(tmp_path / method, entry, tasks, steps=2))
    page = visit(path=reporting.write(folders, tmp_path / "report"))
    panels, select = page.locator("#pareto .panel"), page.locator("#pareto select")
    assert panels.count() == 6  # all the pairs of four
    assert [panels.nth(n).is_visible() for n in range(6)] == [True] + [False] * 5
    select.select_option(label="d accuracy over c accuracy")
    assert [panels.nth(n).is_visible() for n in range(6)] == [False] * 5 + [True]
    select.select_option(label="all of them")
    assert all(panels.nth(n).is_visible() for n in range(6))

"""The page in a real headless Chromium, from a file, with the network off."""

import json
import re
import shutil
import time
from http.server import HTTPServer, SimpleHTTPRequestHandler
from itertools import pairwise

import pytest
from browser import MISSING, WATCH, browser, cut_off, js, unreadable, until, visit
from report_manifest import hostile, made

from curate.report import report

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)
pytest.importorskip("selenium")

PLOTS = ("distances", "map", "quota", "clusters", "insinfo", "rows", "curve", "plane")
LONELY = """
const plot = document.querySelector('#plane .canvas'), box = plot.getBoundingClientRect(), l = plot._fullLayout;
const at = (t, i) => [t.customdata[i], box.x + l.xaxis._offset + l.xaxis.d2p(t.x[i]),
                      box.y + l.yaxis._offset + l.yaxis.d2p(t.y[i])];
const all = plot.data.flatMap((t) => t.x.map((_, i) => at(t, i)));
const near = (a) => Math.min(...all.filter((b) => b !== a).map((b) => Math.hypot(a[1] - b[1], a[2] - b[2])));
return all.sort((a, b) => near(b) - near(a))[0];
"""
LANDMARKS = "return ['header', 'nav', 'main', 'footer'].map((t) => document.querySelectorAll('body > ' + t).length)"
LEVELS = """
return [...document.querySelectorAll('h1, h2, h3')].filter((h) => !h.closest('dialog')).map((h) => +h.tagName[1]);
"""
LINKS = "return [...document.querySelectorAll('a')].map((a) => a.getAttribute('href') ?? a.getAttribute('xlink:href'))"
OPEN_ALL = """
const dialog = document.querySelector('dialog'), next = [...document.querySelectorAll('#samples .bar button')].at(-1);
for (let opened = 0; ; next.click()) {
  for (const row of document.querySelectorAll('#samples tbody tr')) {
    row.click();
    opened += dialog.open;
    dialog.close();
  }
  if (next.disabled) return opened;
}
"""
HOVER = """
document.querySelectorAll('#map .points path, #plane .points path').forEach((n) => {
  n.dispatchEvent(new Event('mouseover'));
});
"""
PRESS = "[...document.querySelectorAll('#samples button')].find((b) => b.textContent === arguments[0]).click()"


@pytest.fixture(scope="module")
def made_run(tmp_path_factory):
    run = made(tmp_path_factory.mktemp("page") / "run", samples=300)
    return run, report(run.folder)


def drawn(chrome, name):
    """Bring a plot into view and wait until it is drawn."""
    js(chrome, "document.getElementById(arguments[0]).scrollIntoView({behavior: 'instant', block: 'center'})", name)
    until(lambda: js(chrome, "return !!document.querySelector('#' + arguments[0] + ' .main-svg')", name))
    time.sleep(0.3)


def fill(chrome, name, value):
    """Set a filter by its label, as its user would."""
    js(chrome, """
        const fields = [...document.querySelectorAll('.filters label')];
        const node = fields.find((l) => l.firstChild.textContent === arguments[0]).querySelector('input, select');
        node.value = arguments[1];
        node.dispatchEvent(new Event('input', {bubbles: true}));
        """, name, value)  # fmt: skip


def told(chrome):
    """(rows found, rows of the page), as the page says aloud."""
    n = re.findall(r"[\d,]+", js(chrome, "return document.getElementById('count').textContent"))
    return tuple(int(x.replace(",", "")) for x in n)


def column(chrome, name):
    """Cells of a column of the samples on this page of the table."""
    return js(chrome, """
        const heads = [...document.querySelectorAll('#samples thead th')].map((h) => h.textContent);
        const place = heads.indexOf(arguments[0]);
        return [...document.querySelectorAll('#samples tbody tr')].map((r) => r.children[place].textContent);
        """, name)  # fmt: skip


def test_it_loads_offline_and_draws_every_plot(made_run):
    _, page = made_run
    with visit(page) as chrome:
        for name in PLOTS:
            drawn(chrome, name)
            assert js(
                chrome, "return document.querySelector(`#${arguments[0]} .canvas`).getAttribute('aria-label')", name
            )
        # nothing but the page itself was asked for
        asked = js(chrome, "return performance.getEntriesByType('resource').map((e) => e.name)")
        assert [name for name in asked if not name.startswith(("data:", "blob:"))] == []


def test_the_network_is_off_indeed():
    from selenium.common.exceptions import WebDriverException

    with HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server, browser() as chrome:
        with pytest.raises(WebDriverException, match="ERR_INTERNET_DISCONNECTED"):
            chrome.get(f"http://127.0.0.1:{server.server_port}/")


def test_the_policy_would_stop_a_script(made_run):
    _, page = made_run
    with browser() as chrome:
        chrome.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": WATCH})
        chrome.get(page.as_uri())
        js(
            chrome,
            "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.hacked = 1'}))",
        )
        js(
            chrome,
            "document.body.append(Object.assign(document.createElement('img'), {src: 'https://example.org/x.png'}))",
        )
        until(lambda: set(js(chrome, "return window.violations")) >= {"script-src-elem", "img-src"})
        assert js(chrome, "return window.hacked") is None


def test_filters_change_the_count_rightly(made_run):
    run, page = made_run
    samples, completions = run.samples, run.completions
    task, tag = run.tasks["task"][1], samples["tags"][0][0]
    noisy = completions.filter(bucket="noisy")["prompt_uid"].to_list()
    by_task, by_tag = samples["task"] == task, samples["tags"].list.contains(tag)
    expected = {
        ("task", "1"): by_task.sum(),
        ("origin", "replay"): (samples["origin"] == "replay").sum(),
        ("bucket", "noisy"): samples["uid"].is_in(noisy).sum(),
        ("tag", tag): by_tag.sum(),
        ("search", samples["uid"][7][:12]): 1,
        ("search", "no such words anywhere"): 0,
    }
    with visit(page) as chrome:
        assert told(chrome) == (samples.height, samples.height)
        for (name, value), n in expected.items():
            fill(chrome, name, value)
            assert told(chrome) == (n, samples.height), (name, value)
            shown = js(chrome, "return document.getElementById('samples').textContent")
            assert ("No row matches." in shown) == (not n) and ("page 1 of" in shown) == bool(n)
            fill(chrome, name, "")
        fill(chrome, "task", "1")
        fill(chrome, "tag", tag)
        assert told(chrome)[0] == (by_task & by_tag).sum()
        assert set(column(chrome, "task")) <= {task[:59] + "…", task}
        js(chrome, "document.querySelector('.filters button').click()")
        until(lambda: told(chrome)[0] == samples.height)


def test_sorting_and_paging(made_run):
    run, page = made_run
    with visit(page) as chrome:
        js(chrome, PRESS, "InsInfo")
        first = [float(x) for x in column(chrome, "InsInfo")]
        scores = sorted(run.samples["insinfo"].drop_nulls())
        assert first == [pytest.approx(x, abs=0.006) for x in scores[:25]]
        heads = "return [...document.querySelectorAll('#samples thead th')].map((h) => h.getAttribute('aria-sort'))"
        assert sorted(set(js(chrome, heads))) == ["ascending", "none"]
        js(chrome, PRESS, "InsInfo")
        assert [float(x) for x in column(chrome, "InsInfo")] == [pytest.approx(x, abs=0.006) for x in scores[::-1][:25]]
        assert "descending" in js(chrome, heads)
        seen = set(column(chrome, "sample"))
        js(
            chrome,
            "[...document.querySelectorAll('#samples .bar button')].find((b) => b.textContent === 'Next').click()",
        )
        assert not seen & set(column(chrome, "sample"))
        assert "page 2 of" in js(chrome, "return document.querySelector('#samples .bar .bar').textContent")


def test_a_click_on_a_point_opens_its_sample(made_run):
    from selenium.webdriver import ActionChains

    run, page = made_run
    with visit(page) as chrome:
        drawn(chrome, "plane")
        # a point with nothing else near it, in the pixels of the viewport
        index, x, y = js(chrome, LONELY)
        data = json.loads(js(chrome, "return document.getElementById('data').textContent"))
        uid = data["samples"]["rows"][index]["uid"]
        actions = ActionChains(chrome)
        actions.w3c_actions.pointer_action.move_to_location(round(x), round(y))
        actions.pause(0.2).click().perform()
        until(lambda: js(chrome, "return document.querySelector('dialog').open"))
        shown = js(chrome, "return document.querySelector('dialog').innerText")
        assert uid in shown
        rewards = run.completions.filter(prompt_uid=uid)["reward"]
        assert len(rewards) == 2 and all(f"{r:.4f}" in shown for r in rewards)


def test_the_keyboard_alone(made_run):
    from selenium.webdriver import ActionChains, Keys

    run, page = made_run
    replay = run.samples.filter(origin="replay")["uid"][0]
    with visit(page) as chrome:

        def keys(*pressed):
            ActionChains(chrome).send_keys(*pressed).perform()

        def focused():
            return js(chrome, "const a = document.activeElement; return a.getAttribute('aria-label') || a.textContent")

        keys(Keys.TAB)
        assert focused() == "Skip to the samples"
        keys(Keys.ENTER, Keys.TAB)
        keys(replay)
        until(lambda: told(chrome)[0] >= 1)
        for _ in range(30):
            keys(Keys.TAB)
            if focused() == f"Open sample {replay[:8]}":
                break
        else:
            pytest.fail("no row can be reached by Tab")
        keys(Keys.ENTER)
        until(lambda: js(chrome, "return document.querySelector('dialog').open"))
        assert focused() == "Close"
        shown = js(chrome, "return document.querySelector('dialog').innerText")
        assert replay in shown and "rows were taken" in shown
        keys(Keys.ESCAPE)
        until(lambda: not js(chrome, "return document.querySelector('dialog').open"))
        assert focused() == f"Open sample {replay[:8]}", "the focus goes back to what opened the sample"


def test_lineage_leads_from_a_rewrite_to_its_row(made_run):
    run, page = made_run
    rewrite = run.samples.filter(origin="augmented").row(0, named=True)
    with visit(page) as chrome:
        fill(chrome, "search", rewrite["uid"])
        js(chrome, "document.querySelector('#samples tbody tr').click()")
        assert "above θ = 0.2" in js(chrome, "return document.querySelector('dialog').innerText")
        js(chrome, "document.querySelector('dialog .link').click()")
        shown = js(chrome, "return document.querySelector('dialog').innerText")
        assert rewrite["parent_uid"] in shown and rewrite["uid"][:8] in shown


@pytest.mark.parametrize("dark", [False, True])
def test_light_and_dark_by_preference_and_by_button(made_run, dark):
    _, page = made_run
    with visit(page, dark=dark) as chrome:

        def brightness(name="body", what="backgroundColor"):
            rgb = js(chrome, "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]", name, what)
            return sum(float(x) for x in re.findall(r"[\d.]+", rgb)[:3]) / 3

        drawn(chrome, "quota")
        ink = "#quota .xtick text"
        assert (brightness() < 60) == dark and (brightness(ink, "fill") > 180) == dark
        js(chrome, "document.getElementById('theme').click()")
        assert (brightness() < 60) != dark
        until(lambda: (brightness(ink, "fill") > 180) != dark)
        for name in ("distances", "curve"):
            drawn(chrome, name)
        assert unreadable(chrome) == []


def test_printing_draws_every_plot_as_wide_as_a_sheet(made_run):
    _, page = made_run
    svgs = "return [...document.querySelectorAll('.canvas')].map((c) => c.querySelector('.main-svg')?.clientWidth)"
    with visit(page, width=1440, dark=True) as chrome:
        js(chrome, """
            addEventListener('beforeprint', () => { window.light = document.documentElement.dataset.theme; });
            addEventListener('beforeprint', () => { window.drawn = (() => { SVGS })(); });
            """.replace("SVGS", svgs))  # fmt: skip
        chrome.execute_cdp_cmd("Page.printToPDF", {})
        widths = js(chrome, "return window.drawn")
        assert len(widths) == len(PLOTS) and all(400 < width <= 700 for width in widths)
        assert js(chrome, "return [window.light, document.documentElement.dataset.theme]") == ["light", "dark"]
        until(lambda: all(width > 400 for width in js(chrome, svgs)) and max(js(chrome, svgs)) > 1000)


@pytest.mark.parametrize("width", [320, 1440])
def test_no_sideways_scroll_of_the_page(made_run, width):
    _, page = made_run
    with visit(page, width=width) as chrome:
        for name in PLOTS:
            drawn(chrome, name)
            wide = js(
                chrome,
                "return document.querySelector(`#${arguments[0]} .main-svg`).getBoundingClientRect().width",
                name,
            )
            assert 150 < wide <= width
        assert js(chrome, "return document.documentElement.scrollWidth") <= width
        js(chrome, "document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        js(chrome, "document.querySelector('#samples tbody tr').click()")
        assert js(chrome, "return document.documentElement.scrollWidth") <= width
        assert cut_off(chrome) == []
        box = js(chrome, "const b = document.querySelector('dialog').getBoundingClientRect(); return [b.left, b.right]")
        assert 0 <= box[0] and box[1] <= width
        assert js(chrome, "const d = document.querySelector('dialog'); return d.scrollWidth - d.clientWidth") <= 0
        js(chrome, "document.querySelector('dialog').close(); document.body.style.width = '300px'")
        wide = "return [...document.querySelectorAll('.main-svg')].map((n) => n.clientWidth)"
        until(lambda: max(js(chrome, wide)) < 300)  # drawn anew for the room that is left


def test_what_a_screen_reader_finds(made_run):
    _, page = made_run
    with visit(page) as chrome:
        assert js(chrome, LANDMARKS) == [1, 1, 1, 1]
        levels = js(chrome, LEVELS)
        assert levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in pairwise(levels))
        assert js(chrome, "return [...document.querySelectorAll('input, select')].every((n) => n.closest('label'))")
        assert js(chrome, "return [...document.querySelectorAll('th')].every((n) => n.scope)")
        assert js(chrome, "return document.getElementById('count').getAttribute('aria-live')") == "polite"
        assert js(
            chrome, "return [...document.querySelectorAll('figure')].every((f) => f.querySelector('details table'))"
        )
        assert js(chrome, "return [...document.querySelectorAll('button')].every((b) => b.textContent.trim())")


def test_hostile_rows_run_nothing_and_break_nothing(tmp_path):
    run = made(tmp_path / "run", samples=300, text=hostile)
    with visit(report(run.folder)) as chrome:
        for name in PLOTS:
            drawn(chrome, name)
        assert told(chrome) == (run.samples.height, run.samples.height)
        elements = js(chrome, "return [...document.querySelectorAll('*')].map((n) => n.tagName.toLowerCase())")
        assert {"img", "iframe", "object", "embed"} & set(elements) == set()
        assert elements.count("script") == 4, "the data, the page's code, the library as text, and as code"
        assert all(link.startswith("#") for link in js(chrome, LINKS))
        assert js(chrome, OPEN_ALL) == run.samples.height
        for task in range(run.tasks.height):
            fill(chrome, "task", str(task))
            assert told(chrome)[0] == run.samples.filter(stage=task + 1).height
        fill(chrome, "task", "")
        fill(chrome, "search", "<script>window.hacked")
        assert 0 < told(chrome)[0] < run.samples.height
        text = js(
            chrome, "return document.getElementById('samples').textContent + document.querySelector('main').textContent"
        )
        assert not re.search("[\u202a-\u202e\u2066-\u2069\u200b\0\x07\x1b]", text)
        assert "U+202E" in text
        js(chrome, HOVER)
        assert js(chrome, "return window.hacked") is None
        assert js(chrome, "return document.documentElement.scrollWidth <= innerWidth")
        assert js(chrome, "return Object.prototype.hasOwnProperty('hacked')") is False


def test_a_set_that_the_page_shows_a_part_of_says_so(made_run, monkeypatch, tmp_path):
    run, _ = made_run
    monkeypatch.setattr("curate.report.rows.MOST_ROWS", 60)
    shutil.copytree(run.folder, tmp_path / "run")
    with visit(report(tmp_path / "run", tmp_path / "page.html")) as chrome:
        says = js(chrome, "return document.querySelector('#samples > p').textContent")
        assert says.startswith(f"60 of {run.samples.height} samples are on this page")
        assert told(chrome) == (60, 60)

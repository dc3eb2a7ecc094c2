"""The page of 100,000 rows: seconds to make it, its size, and how soon it answers in headless Chromium.

    python benchmarks/report.py [--rows 100000] [--runs 5]

The manifest is the made one of the tests: half of its rows of the newest task, two rollouts a row, a tenth rewritten.
A fresh browser each time, the page a file, the network off; times are of the page's own clock, from the start of the
navigation. First interaction: a number is typed into the search as soon as the loaded page has been painted, until the
changed count of rows is painted. Then one more letter every 100 ms for five seconds, while the plots are being drawn:
the longest of them waits for the library that draws plots. Needs Debian's chromium and chromium-driver.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from browser import browser
from report_manifest import made

from curate.report import report

WATCH = """
addEventListener('load', () => requestAnimationFrame(() => setTimeout(() => {
  const box = document.querySelector('input[type=search]'), told = document.getElementById('count');
  const painted = (done) => requestAnimationFrame(() => setTimeout(() => done(performance.now())));
  const type = (text) => { box.value = text; box.dispatchEvent(new Event('input', {bubbles: true})); };
  const before = told.textContent;
  window.seen = {ready: performance.now(), later: []};
  type('99');
  window.seen.changed = told.textContent !== before;
  painted((now) => {
    window.seen.first = now;
    const again = (n, from) => n ? setTimeout(() => {
      type(n % 2 ? '9' : '99');
      painted((end) => { window.seen.later.push(end - from - 100); again(n - 1, performance.now()); });
    }, 100) : window.seen.done = true;
    again(50, performance.now());
  });
})));
"""


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        manifest = made(run, given.rows, tasks=20)
        print(f"{manifest.samples.height:,} samples, {manifest.completions.height:,} rollouts, "
              f"{manifest.drops.height:,} drops, {manifest.instructions.height:,} instructions")  # fmt: skip
        start = time.perf_counter()
        page = report(run)
        print(f"page made in {time.perf_counter() - start:.1f} s, {page.stat().st_size / 1e6:.2f} MB")
        found = [look(page.as_uri()) for _ in range(given.runs)]
    for name, key in (("table painted", "ready"), ("first interaction", "first"), ("longest answer later", "worst")):
        values = [each[key] / 1000 for each in found]
        print(f"{name}: median {statistics.median(values):.2f} s, {min(values):.2f} to {max(values):.2f}")


def look(address: str) -> dict[str, float]:
    """Milliseconds of one visit with a fresh browser."""
    with browser(width=1440) as chrome:
        chrome.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": WATCH})
        chrome.get(address)
        while not chrome.execute_script("return window.seen?.done"):
            time.sleep(0.5)
        seen = chrome.execute_script("return window.seen")
    assert seen["changed"]
    return {"ready": seen["ready"], "first": seen["first"], "worst": max(seen["later"])}


if __name__ == "__main__":
    main()

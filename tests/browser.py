"""Headless Chromium of the system with a profile of its own, for the tests and the benchmark of the page."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

BINARY = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
MISSING = "" if BINARY and DRIVER else "no Chromium with its driver here (Debian: chromium, chromium-driver)"
FLAGS = ("--headless=new", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage")  # fmt: skip

WATCH = """
window.violations = [];
addEventListener('securitypolicyviolation', (event) => window.violations.push(event.violatedDirective));
window.alert = window.confirm = window.prompt = () => { window.hacked = 1; };
"""
PAINTED = """
const css = (node, name) => getComputedStyle(node)[name];
const card = css(document.querySelector('.card'), 'backgroundColor'), root = getComputedStyle(document.documentElement);
const runs = [...Array(12)].map((_, i) => [root.getPropertyValue(`--run-${i + 1}`).trim(), card]);
const lines = [...document.querySelectorAll('.js-line')].map((n) => [css(n, 'stroke'), card]);
const cells = [...document.querySelectorAll('.heatmap-label text')].flatMap((n) =>
  n.closest('.canvas')._fullData[0].colorscale.map(([, end]) => [css(n, 'fill'), end]));
return [...runs, ...lines, ...cells];
"""
CUT = """
const shown = (selector) => [...document.querySelectorAll(selector)].filter((n) => n.getClientRects().length);
document.querySelectorAll('.scroll').forEach((n) => { n.scrollLeft = 40; });
const captions = shown('caption span').filter((n) => {
  const box = n.getBoundingClientRect();
  return box.left < 0 || box.right > innerWidth;
});
const broken = shown('tbody th').filter((n) => {
  const range = document.createRange();
  range.selectNodeContents(n);
  return !/\\s/.test(n.textContent) && range.getBoundingClientRect().height > 1.6 * range.getClientRects()[0].height;
});
return [...captions, ...broken].map((n) => n.textContent);
"""


@contextmanager
def browser(width: int = 1280, height: int = 900, dark: bool = False) -> Iterator[Any]:
    """A browser with the network off, a viewport of exactly this size, and a log of its console."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(BINARY)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        for flag in (*FLAGS, *root, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        chrome = webdriver.Chrome(options=options, service=Service(DRIVER))
        try:
            chrome.execute_cdp_cmd("Network.enable", {})
            offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
            chrome.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
            size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
            chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
            chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
            yield chrome
        finally:
            chrome.quit()


@contextmanager
def visit(page, **how):
    """A browser that has loaded the page; nothing may be in its console when it goes."""
    with browser(**how) as chrome:
        chrome.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": WATCH})
        chrome.get(page.as_uri())
        yield chrome
        assert [entry["message"] for entry in chrome.get_log("browser")] == []
        assert chrome.execute_script("return window.violations") == []


def until(what, seconds=20.0):
    """Wait for something to become true, and return it."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)
    return found


def contrast(one, other):
    """Of two opaque colours as CSS has them, by WCAG: 1 to 21."""

    def luminance(colour):
        found = re.findall(r"[\d.]+", colour) if "(" in colour else [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        parts = [float(x) / 255 for x in found[:3]]
        r, g, b = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05

    low, high = sorted((luminance(one), luminance(other)))
    return high / low


def unreadable(chrome):
    """(colour, behind it) of lines, of runs' colours, and of numbers in heat maps, where the contrast is below 4.5."""
    return [pair for pair in js(chrome, PAINTED) if contrast(*pair) < 4.5]


def cut_off(chrome):
    """Texts of captions that do not lie in the window, and of row heads that break inside a word."""
    return js(chrome, CUT)


def js(chrome, code, *arguments):
    return chrome.execute_script(code, *arguments)

"""The page in a real browser: Chromium without a window, if one is installed.

A page of ours holds the report in frames of a phone's and a desktop's width and measures them; Chromium prints the
result, and everything that its console says, policies that were violated included.
"""

import json
import re
import shutil
import subprocess
from html import escape
from pathlib import Path

import pytest

from report_example import side, tried_trees, write_bench, write_run, write_served
from vsd.report import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (360, 1280)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")

MEASURE = """
<script>
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, view = frame.contentWindow;
    page.querySelectorAll("details").forEach(one => { one.open = true; });
    const texts = [...page.querySelectorAll("svg text")];
    const inside = one => {
      const box = one.getBoundingClientRect(), frame = one.ownerSVGElement.getBoundingClientRect();
      return box.left >= frame.left - 1 && box.right <= frame.right + 1;
    };
    return {
      width: page.documentElement.scrollWidth,
      wide: [...page.querySelectorAll("body *")].filter(one => !one.closest("pre, svg"))
        .filter(one => one.getBoundingClientRect().right > view.innerWidth + 1).map(one => one.tagName),
      outside: texts.filter(one => !inside(one)).map(one => one.textContent),
      font: Math.min(...texts.map(one => 12.5 * one.ownerSVGElement.getBoundingClientRect().width / 360)),
    };
  });
  document.body.innerHTML = `<pre>${JSON.stringify(found)}</pre>`;
});
</script>
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that a page can hold, with long names."""
    folder = tmp_path_factory.mktemp("browser")
    names = ("eagle3", "a-run-with-a-rather-long-name-of-its-own-that-goes-on-and-on")
    runs = [write_run(folder / name) for name in names]
    drafters = {str(run / "drafter"): 2.0 for run in runs}
    bench = write_bench(folder / "bench.json", drafters, trees=tried_trees(), command=f"vsd bench {'x' * 300}")
    served = write_served(folder / "served.json", side(0.6, 0.4, 0.2))
    return write_report([*runs, bench, served], folder / "report.html")


def shown(page: Path) -> tuple[list[dict[str, object]], list[str]]:
    """(measurements of every width, lines of the console)."""
    frames = [f'<iframe style="width: {w}px; border: 0" srcdoc="{escape(page.read_text())}"></iframe>' for w in WIDTHS]
    around = page.with_name("around.html")
    around.write_text(f'<!doctype html><meta charset="utf-8"><body>{"".join(frames)}{MEASURE}')
    command = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--enable-logging=stderr",
    ]
    command += [f"--user-data-dir={page.parent / 'profile'}", "--dump-dom", around.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    found = re.search(r"<pre>(\[.*?\])</pre>", done.stdout, re.S)
    assert found, done.stdout[-2000:]
    return json.loads(found[1]), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_a_phone_and_a_desktop_show_all_of_it(page: Path) -> None:
    """Nothing is wider than the screen, no label leaves its figure, labels are readable, the console is silent."""
    measured, console = shown(page)
    assert console == []
    assert [one["width"] for one in measured] == list(WIDTHS)
    assert [one["wide"] for one in measured] == [[], []]
    assert [one["outside"] for one in measured] == [[], []]
    assert all(float(str(one["font"])) > 10.5 for one in measured)

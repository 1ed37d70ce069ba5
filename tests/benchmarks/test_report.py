"""Time, memory and size of the report of a run with very many examples, and how soon it opens.

    python -m pytest tests/benchmarks/test_report.py -s -o addopts=--import-mode=importlib

`CURATE_BENCH_ROWS` is how many examples there are (1,000,000); `CURATE_BENCH_RUN` names a run
folder that is there already. The run is made by `curate plan` on text of eight domains and twelve
labels: length, random, exact duplicates, and a table of scores from elsewhere.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from report.large_run import make_run

ROWS = int(float(os.environ.get("CURATE_BENCH_ROWS", "1000000")))
GIVEN = os.environ.get("CURATE_BENCH_RUN")
PAGE_MB = 15
OPENS_SECONDS = 3.0
MEMORY_MB = 1000
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update",
         "--disable-sync"]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(GIVEN) if GIVEN else make_run(tmp_path_factory.mktemp("large"), ROWS)


@pytest.fixture(scope="module")
def page(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "report.html"
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-m", "curate", "report", str(run), "--out", str(out), "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    told = json.loads(done.stdout)["document"]
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    sizes = f"document {len(json.dumps(told)) / 1e6:.2f} MB, page {out.stat().st_size / 1e6:.2f} MB"
    print(f"\n{told['facts'][0]['value']} examples: {wall:.1f} s, CPU {cpu:.1f} s, {sizes}")
    return out


def test_the_page_is_small_and_needs_little_memory(run: Path, page: Path, tmp_path: Path):
    assert page.stat().st_size <= PAGE_MB * 1e6
    program = (
        "import resource, sys; from pathlib import Path; from jobs.report import report\n"
        "report(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    arguments = [sys.executable, "-c", program, str(run), str(tmp_path / "again.html")]
    done = subprocess.run(arguments, check=True, capture_output=True, text=True)
    peak = int(done.stdout.split()[-1])
    print(f"peak memory {peak:,} MB")
    assert peak <= MEMORY_MB


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_the_page_opens_soon_and_asks_for_nothing(page: Path):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        times: list[float] = []
        for _ in range(3):
            context = browser.new_context(viewport={"width": 1200, "height": 900})
            opened = context.new_page()
            asked: list[str] = []
            opened.on("request", lambda request, asked=asked: asked.append(request.url))
            started = time.perf_counter()
            opened.goto(page.as_uri())
            times.append(time.perf_counter() - started)
            assert asked == [page.as_uri()]
            context.close()
        browser.close()
    print(f"opens in {', '.join(f'{seconds:.2f} s' for seconds in times)}")
    assert sorted(times)[1] < OPENS_SECONDS

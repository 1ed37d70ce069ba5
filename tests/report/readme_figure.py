"""The picture of a report in the README: `python tests/report/readme_figure.py RUN`.

Of the summary of `configs/quickstart.yaml`, 1,200 pixels wide, to `docs/figures/report.png`.
"""

import shutil
import sys
import tempfile
from io import BytesIO
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from curate.report.page import render
from jobs.report import gather

TARGET = Path(__file__).parents[2] / "docs" / "figures" / "report.png"
SECOND = "#summary figure:nth-of-type(2)[data-drawn] svg"
END = "document.querySelector('#summary h3').getBoundingClientRect().top - 14"


def photograph(html: str) -> bytes:
    """The page's first tab down to the end of its figures."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        file = Path(folder) / "report.html"
        file.write_text(html, encoding="utf-8")
        browser = driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme="light")
        page.goto(file.as_uri())
        page.wait_for_selector(SECOND)
        height = page.evaluate(END)
        picture = page.screenshot(
            full_page=True, clip={"x": 0, "y": 0, "width": 1200, "height": height}
        )
        browser.close()
    return picture


def main(run: Path) -> None:
    """Write the picture, in few colours."""
    # The reader has the run in runs/, wherever it was made.
    html = render(gather(run)).replace(str(run.resolve()), f"runs/{run.name}")
    with Image.open(BytesIO(photograph(html))) as picture:
        few = picture.convert("RGB").quantize(96, dither=Image.Dither.NONE)
        few.save(TARGET, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""
Take the picture of the demo's page that leads the README: from the title to the steps of one layer. It needs Chromium,
and the page that runs.

    python demo/app.py --port 7860 & python docs/page_picture.py http://127.0.0.1:7860
"""

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import expect, sync_playwright


WIDTH = 1280  # pixels


def main(url: str):
    """Save the picture of the page at that address."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": 900}, color_scheme="light")
        page.goto(url)
        expect(page.locator("#inside table").first).to_be_visible(timeout=60_000)
        expect(page.locator(".pending, .generating")).to_have_count(0, timeout=60_000)
        box = page.locator("#steps").bounding_box()
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": box["y"] + box["height"] + 16}
        picture = Image.open(io.BytesIO(page.screenshot(full_page=True, clip=clip))).convert("RGB")
        browser.close()
    palette = picture.quantize(256, Image.Quantize.MAXCOVERAGE)  # the colours of the maps are rare, and have to stay
    small = picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
    small.save(Path(__file__).parent / "demo.png", optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])

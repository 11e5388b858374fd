"""The demo in a real browser."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from urllib.error import URLError

import pytest
from conftest import ROOT
from playwright.sync_api import Page, expect, sync_playwright


CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@pytest.fixture(scope="module")
def url():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "demo" / "app.py"), "--port", str(port)], env=os.environ, stderr=subprocess.PIPE
    )
    try:
        for _ in range(600):
            assert process.poll() is None, process.stderr.read().decode()
            try:
                urllib.request.urlopen(url).close()
                break
            except URLError:
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def page(url):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(60_000)
        expect.set_options(timeout=60_000)
        page.goto(url)
        yield page
        browser.close()


def picture(page: Page, name: str) -> bytes:
    """The bytes of the picture that the page shows there."""
    return page.request.get(page.locator(f"#{name} img").get_attribute("src")).body()


def wait_for_change(page: Page, name: str, before: bytes) -> bytes:
    for _ in range(300):
        if (after := picture(page, name)) != before:
            return after
        page.wait_for_timeout(200)
    raise AssertionError(f"the picture {name} did not change")


def test_first_result_is_there(page):
    for name in ("photo", "overlay", "map"):
        image = page.locator(f"#{name} img")
        expect(image).to_be_visible()
        page.wait_for_function("image => image.naturalWidth > 0", arg=image.element_handle())
        assert image.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [451, 300]
    assert picture(page, "overlay") != picture(page, "map")


def test_layer_and_head_change_the_map(page):
    expect(page.locator("#map img")).to_be_visible()
    overlay, last = picture(page, "overlay"), picture(page, "map")
    number = page.locator("#layer input[type=number]")
    number.fill("2")
    number.press("Enter")
    third = wait_for_change(page, "map", last)
    page.locator("#head label", has_text="head 1").click()
    wait_for_change(page, "map", third)
    assert picture(page, "overlay") == overlay


def test_upload(page, tmp_path, noise):
    noise.save(tmp_path / "upload.png")
    expect(page.locator("#overlay img")).to_be_visible()
    before = picture(page, "overlay")
    page.locator('#photo button[aria-label="Remove Image"]').click()
    page.locator("#photo input[type=file]").set_input_files(tmp_path / "upload.png")
    page.wait_for_function("document.querySelector('#overlay img')?.naturalWidth == 70")
    assert picture(page, "overlay") != before


def test_damaged_upload_is_one_sentence(page, tmp_path, photo):
    photo.save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:20000])
    page.locator('#photo button[aria-label="Remove Image"]').click()
    page.locator("#photo input[type=file]").set_input_files(tmp_path / "cut.png")
    expect(page.get_by_text("cut.png is damaged")).to_be_visible()

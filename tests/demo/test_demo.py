"""The page in a real browser."""

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
def url(tmp_path_factory):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    environment = os.environ | {"GRADIO_TEMP_DIR": str(tmp_path_factory.mktemp("uploads"))}
    log = tmp_path_factory.mktemp("log") / "log.txt"
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "demo" / "app.py"), "--port", str(port)],
            env=environment,
            stdout=file,
            stderr=file,
        )
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(url).close()
                break
            except URLError:
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        expect.set_options(timeout=60_000)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, url):
    """The page, which must leave nothing on the console."""
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.set_default_timeout(60_000)
    problems = []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(url)
    expect(page.locator("#inside table").first).to_be_visible()
    yield page
    page.close()
    assert not problems


def source(page: Page, part: str) -> str:
    """The first picture in a part of the page."""
    return page.locator(f"#{part} img").first.get_attribute("src")


def wait_for_change(page: Page, part: str, before: str) -> str:
    picture = page.locator(f"#{part} img").first
    expect(picture).not_to_have_attribute("src", before)
    return picture.get_attribute("src")


def fill(page: Page, name: str, value: int):
    field = page.locator(f"#{name} input[type=number]").first
    field.fill(str(value))
    field.press("Enter")


def test_first_result_is_there(page):
    for part in ("photo", "segments", "steps", "glance"):
        picture = page.locator(f"#{part} img").first
        expect(picture).to_be_visible()
        assert picture.evaluate("image => image.naturalWidth") > 0
    photo, segments = (page.locator(f"#{part} .stage").bounding_box() for part in ("photo", "segments"))
    assert (photo["width"], photo["height"], photo["y"]) == (segments["width"], segments["height"], segments["y"])


def test_click_on_the_photo_chooses_a_patch(page):
    before = source(page, "glance")
    box = page.locator("#photo .stage").bounding_box()
    # The middle of patch (2, 20) of 16 x 24.
    page.mouse.click(box["x"] + box["width"] * 20.5 / 24, box["y"] + box["height"] * 2.5 / 16)
    wait_for_change(page, "glance", before)
    expect(page.locator("#row input")).to_have_value("2")
    expect(page.locator("#column input")).to_have_value("20")
    assert "row=2&column=20" in page.url


def test_layer_and_head_change_the_steps(page):
    segments, steps = source(page, "segments"), source(page, "steps")
    fill(page, "layer", 7)
    steps = wait_for_change(page, "steps", steps)
    page.locator("#head label", has_text="1").click()
    wait_for_change(page, "steps", steps)
    assert source(page, "segments") == segments


def test_upload(page, tmp_path, noise):
    noise.save(tmp_path / "upload.png")
    before = source(page, "segments")
    page.locator("#picker input[type=file]").set_input_files(tmp_path / "upload.png")
    wait_for_change(page, "segments", before)
    expect(page.locator("#photo figcaption")).to_contain_text("upload.png")


def test_damaged_upload_is_one_sentence(page, tmp_path, photo):
    photo.save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:20000])
    before = source(page, "segments")
    page.locator("#picker input[type=file]").set_input_files(tmp_path / "cut.png")
    expect(page.locator("#status")).to_contain_text("cut.png is damaged")
    assert source(page, "segments") == before

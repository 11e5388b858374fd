"""The page in a real browser."""

import base64
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright


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
    """The address of the page, served from a copy of its folder, as on a Space."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    folder = shutil.copytree(ROOT / "demo", tmp_path_factory.mktemp("space") / "demo")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"GRADIO_TEMP_DIR": str(tmp_path_factory.mktemp("uploads")), "PYTHONPATH": path}
    log = tmp_path_factory.mktemp("log") / "log.txt"
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, "app.py", "--port", str(port)],
            env=environment,
            cwd=folder,
            stdout=file,
            stderr=file,
        )
    try:
        for _ in range(1500):
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


@contextmanager
def visit(browser: Browser, url: str, **options) -> Iterator[Page]:
    """
    A new page whose scripts have started. The test fails if an error is on its console. A test that needs another
    address visits it anew: if a visitor leaves a page before an answer, Gradio reports an error.
    """
    page = browser.new_page(**options)
    page.set_default_timeout(60_000)
    problems = []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(url)
    page.wait_for_url("**/*photo=*")  # its scripts have started
    yield page
    at_rest(page)
    page.close()
    assert not problems


@pytest.fixture
def page(browser, url):
    with visit(browser, url, viewport={"width": 1400, "height": 900}) as page:
        yield page


def at_rest(page: Page):
    """Wait until the page has all answers, and asks for no more."""
    working = page.locator(".pending, .generating, .working")
    frames = 0
    while frames < 20:  # in a row; counted, not timed, so that a slow machine has as many
        expect(working).to_have_count(0)
        page.evaluate("() => new Promise((then) => requestAnimationFrame(() => setTimeout(then)))")
        frames = 0 if working.count() else frames + 1


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


def test_first_result_is_shown(page):
    expect(page).to_have_title("CBSA: a photo explained by a few representatives")
    for part in ("photo", "segments", "steps", "glance"):
        picture = page.locator(f"#{part} img").first
        expect(picture).to_be_visible()
        assert picture.evaluate("image => image.naturalWidth") > 0
    photo, segments = (page.locator(f"#{part} .stage").bounding_box() for part in ("photo", "segments"))
    for side in ("width", "height", "y"):
        assert photo[side] == pytest.approx(segments[side], abs=0.5)


def test_click_changes_maps_and_address(page):
    glance, steps = source(page, "glance"), source(page, "steps")
    box = page.locator("#photo .stage").bounding_box()
    # The middle of patch (2, 20) of 21 x 32.
    page.mouse.click(box["x"] + box["width"] * 20.5 / 32, box["y"] + box["height"] * 2.5 / 21)
    wait_for_change(page, "glance", glance)
    steps = wait_for_change(page, "steps", steps)
    expect(page.locator("#row input")).to_have_value("2")
    expect(page.locator("#column input")).to_have_value("20")

    page.locator("#glance button[data-layer='7'][data-head='1']").click()
    wait_for_change(page, "steps", steps)
    expect(page.locator("#layer input[type=number]")).to_have_value("7")
    expect(page.locator("#head input[value='1']")).to_be_checked()
    expect(page.locator("#glance button[data-layer='7'][data-head='1']")).to_have_attribute("aria-pressed", "true")

    stage = page.locator("#steps [data-pick=representative]")
    box = stage.bounding_box()
    stage.click(position={"x": box["width"] * 5.5 / 8, "y": box["height"] * 1.5 / 8})
    expect(page.locator("#representative input")).to_have_value("13")
    expect(page.locator("#steps")).to_contain_text("Chosen: representative (1, 5)")
    page.wait_for_url("**/*photo=coffee&layer=7&head=1&row=2&column=20&representative=13")


def test_controls_change_the_results(page):
    glance, segments = source(page, "glance"), source(page, "segments")
    for name, value in {"query": "CLS", "kind": "exact"}.items():
        page.locator(f"#{name} label", has_text=value).click()
        glance = wait_for_change(page, "glance", glance)
    page.locator("#shared input").check()
    expect(page.locator("#glance .bar")).to_be_visible()
    fill(page, "number", 6)
    segments = wait_for_change(page, "segments", segments)
    expect(page.locator("#legend tbody tr")).to_have_count(6)
    page.locator("#sharp input").check()
    segments = wait_for_change(page, "segments", segments)
    page.locator("#method input").click()
    page.get_by_role("option", name="attention").click()
    wait_for_change(page, "segments", segments)
    fill(page, "opacity", 1)
    expect(page.locator("#segments .labels")).to_have_css("opacity", "1")
    page.locator("#behind input").check()
    expect(page.locator("#steps .map").first).to_have_css("opacity", "0.6")
    fill(page, "row", 99)
    expect(page.locator("#steps")).to_contain_text("The row is 99; give a whole number from 0 to 20.")


def test_examples_are_shown(page):
    titles = {
        "chelsea": "Cat",
        "astronaut": "Astronaut",
        "camera": "Cameraman",
        "immunohistochemistry": "Tissue",
        "rocket": "Rocket (fails)",
        "coffee": "Coffee",
    }
    for name, title in titles.items():
        page.locator(f"[data-example={name}]").click()
        expect(page.locator("#photo figcaption")).to_contain_text(title)
        expect(page.locator("#status")).to_contain_text(f"{title}: 4 segments")
        expect(page.locator("#photo .remark")).to_have_count(1 if "fails" in title else 0)


def test_control_counts_while_a_photo_is_loading(page, browser):
    page.locator("[data-example=astronaut]").click()
    fill(page, "layer", 9)
    page.locator("[data-example=chelsea]").click()
    fill(page, "layer", 1)
    page.wait_for_url("**/*photo=chelsea&layer=1&*")
    at_rest(page)
    with visit(browser, page.url) as by_link:
        for part in ("photo", "segments", "steps", "glance"):
            expect(by_link.locator(f"#{part} img").first).to_have_attribute("src", source(page, part))


def test_choice_counts_while_another_is_loading(page):
    at_rest(page)
    requests, held = "**/queue/join*", []
    page.route(requests, lambda route: held.append(route) if len(held) < 2 else route.continue_())
    for name in ("astronaut", "chelsea"):
        with page.expect_request(requests):
            page.locator(f"[data-example={name}]").click()
    for route in held:  # in the order of the clicks
        with page.expect_response(requests):
            route.continue_()
    page.wait_for_url("**/*photo=chelsea&*")


def test_bad_link_is_one_sentence(browser, url):
    with visit(browser, f"{url}?photo=coffee&layer=99") as page:
        expect(page.locator("#status")).to_contain_text("The layer is 99; give a whole number from 0 to 11.")


def test_removed_photo_clears_the_page(page):
    page.get_by_role("button", name="Remove").click()
    for part in ("photo", "segments", "steps", "glance", "inside"):
        expect(page.locator(f"#{part}")).to_contain_text("Choose an example or upload a photo.")
        expect(page.locator(f"#{part} img")).to_have_count(0)


def test_models_are_changed_and_compared(page):
    before = source(page, "segments")
    page.get_by_text("Compare two models").click()
    page.locator("#other input").click()
    page.get_by_role("option", name="street segmenter").click()
    expect(page.locator("#comparison .stage")).to_have_count(2)
    page.locator("#comparison .split").first.fill("20")
    assert "20%" in page.locator("#comparison .stage").first.get_attribute("style")
    page.locator("#model input").click()
    page.get_by_role("option", name="street segmenter").click()
    wait_for_change(page, "segments", before)
    expect(page.locator("#inside")).to_contain_text("This model has no classifier.")


def test_street_scene(page):
    page.get_by_text("Street scenes", exact=True).click()
    for name in ("flip", "edges"):  # each doubles the time
        page.locator(f"#{name} input").uncheck()
    page.locator("#find").click()
    expect(page.locator("#street .classes li").first).to_be_visible()
    page.locator("[data-example=chelsea]").click()
    expect(page.locator("#street img")).to_have_count(0)


def test_downloads(page, tmp_path):
    found = {}
    for kind in ("mask", "segments", "maps"):
        with page.expect_download() as download:
            page.locator(f"#save-{kind}").click()
        found[kind] = tmp_path / download.value.suggested_filename
        download.value.save_as(found[kind])
    mask = np.asarray(Image.open(found["mask"]).convert("L"))
    assert mask.shape == (400, 600)
    assert set(np.unique(mask)) == {0, 255}
    assert Image.open(found["segments"]).size == (600, 400)
    with np.load(found["maps"]) as arrays:
        assert arrays["map_of_patch"].shape == (12, 3, 21, 32)
        assert arrays["layer_3_reads"].shape == (3, 64, 21, 32)


def test_upload(page, tmp_path, noise):
    noise.save(tmp_path / "upload.png")
    before = source(page, "segments")
    page.locator("#picker input[type=file]").set_input_files(tmp_path / "upload.png")
    wait_for_change(page, "segments", before)
    expect(page.locator("#photo figcaption")).to_contain_text("upload.png")
    page.wait_for_url(lambda address: "photo=" not in address)


CARRY = """
([kind, name, content]) => {
  const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
  const carried = new DataTransfer();
  carried.items.add(new File([bytes], name, { type: "image/png" }));
  const event = kind === "paste"
    ? new ClipboardEvent("paste", { clipboardData: carried, bubbles: true })
    : new DragEvent("drop", { dataTransfer: carried, bubbles: true, cancelable: true });
  document.body.dispatchEvent(event);
}
"""


@pytest.mark.parametrize("kind", ["paste", "drop"])
def test_photo_is_pasted_or_dropped(page, tmp_path, noise, kind):
    noise.save(tmp_path / "carried.png")
    content = base64.b64encode((tmp_path / "carried.png").read_bytes()).decode()
    before = source(page, "segments")
    page.evaluate(CARRY, [kind, f"{kind}.png", content])
    wait_for_change(page, "segments", before)
    expect(page.locator("#photo figcaption")).to_contain_text(f"{kind}.png")


def test_old_results_are_dimmed_while_a_photo_is_loading(page):
    at_rest(page)
    held = []
    page.route("**/queue/join*", lambda route: held.append(route))
    page.locator("[data-example=chelsea]").click()
    for part in ("segments", "legend", "steps", "glance", "inside"):
        expect(page.locator(f"#{part}")).to_have_css("opacity", "0.4")
    page.unroute("**/queue/join*")  # releases the held requests
    expect(page.locator("#status")).to_contain_text("Cat: 4 segments")
    at_rest(page)
    expect(page.locator("#segments")).to_have_css("opacity", "1")


ORDER = [
    *("header", "picker", "model", "row", "column", "method", "number", "opacity", "sharp"),
    *("save-mask", "save-segments", "save-maps", "layer", "head", "representative", "behind"),
    *("query", "kind", "shared", "glance"),
]


def test_keys_reach_all_parts_in_order(page):
    named = "[id]:not(input, [id^=component], [id^=range], [id^=html])"  # named by this project, not by Gradio
    reached, focused = [], f"() => document.activeElement.closest('{named}')?.id"
    while "glance" not in reached and len(reached) < 60:
        page.keyboard.press("Tab")
        part = page.evaluate(focused)
        if part not in reached:
            reached.append(part)
    assert [part for part in reached if part in ORDER] == ORDER

    before = source(page, "steps")
    page.keyboard.press("Enter")  # on the first map
    wait_for_change(page, "steps", before)
    expect(page.locator("#layer input[type=number]")).to_have_value("0")
    expect(page.locator("#status [role=status]")).to_have_count(1)
    page.locator("[data-example=chelsea]").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_contain_text("Cat: 4 segments")


def test_links_open_folded_parts(page):
    page.evaluate("window.same = true")
    for name, content in {
        "Model card": "cbsa-tiny-imagenette",
        "Use it from code": "gradio_client",
        "What it cannot do": "mean IoU",
    }.items():
        link = page.get_by_role("link", name=name)
        link.click()
        expect(page.locator(link.get_attribute("href")).get_by_text(content).first).to_be_visible()
    assert page.evaluate("window.same")  # the page was not loaded anew


def test_damaged_upload_is_one_sentence(page, tmp_path, photo):
    photo.save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:20000])
    before = source(page, "segments")
    page.locator("#picker input[type=file]").set_input_files(tmp_path / "cut.png")
    expect(page.locator("#status p")).to_have_text(re.compile(r"^cut\.png is damaged .*[^.]\.$"))
    assert source(page, "segments") == before


def test_too_large_an_upload_is_not_sent(page, tmp_path):
    (tmp_path / "huge.png").write_bytes(bytes(31 * 10**6))
    page.locator("#picker input[type=file]").set_input_files(tmp_path / "huge.png")
    expect(page.locator("#status")).to_contain_text("huge.png has 31 MB; this page takes photos up to 30 MB.")


CONTRAST = """
() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const parse = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const colour = parse(getComputedStyle(node).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255, 255];
  };
  const poor = [];
  for (const node of document.querySelectorAll("body *")) {
    const text = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    if (!text || !node.checkVisibility() || node.closest(".unseen")) continue;
    const [r, g, b, a] = parse(getComputedStyle(node).color);
    const ground = behind(node);
    const seen = [r, g, b].map((value, i) => (value * a + ground[i] * (255 - a)) / 255);
    const [low, high] = [light(seen), light(ground)].sort((x, y) => x - y);
    if ((high + 0.05) / (low + 0.05) < 4.5) poor.push(node.textContent.trim().slice(0, 40));
  }
  return poor;
}
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 1280, 390])
def test_every_width_in_light_and_dark(browser, url, tmp_path_factory, width, scheme):
    """The page fits its width, and texts and names are accessible. Screenshots go to a folder."""
    is_phone = width < 500
    options = {"is_mobile": is_phone, "has_touch": is_phone, "color_scheme": scheme}
    with visit(browser, url, viewport={"width": width, "height": 900}, **options) as page:
        at_rest(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        folder = Path(os.environ.get("SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
        page.screenshot(path=folder / f"{width}-{scheme}.png", full_page=True)
        assert page.evaluate("[...document.images].filter((image) => image.getAttribute('alt') === null).length") == 0
        assert page.locator("button:visible:not([aria-label])").filter(has_not_text=re.compile(r"\S")).count() == 0
        if is_phone:
            photo, segments = (page.locator(f"#{part} .stage").bounding_box() for part in ("photo", "segments"))
            assert segments["y"] > photo["y"] + photo["height"]
            page.locator("#glance").scroll_into_view_if_needed()
            page.mouse.wheel(0, 300)
            expect(page.locator("#layer")).to_be_in_viewport()
        for title in page.locator("button.label-wrap").all():
            title.click()
        at_rest(page)
        assert page.evaluate(CONTRAST) == []

"""The server of the page: uploads, answers to programs and agents, limits, and what it keeps."""

import base64
import importlib.util
import io
import json
import os
import re
import sys
import threading
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import app
import httpx
import numpy as np
import pytest
import skimage.data
from cbsa_demo import admission, looks, photos, text
from cbsa_demo.answers import Answers
from cbsa_demo.page import SERVER, build_page
from cbsa_demo.parameters import flag, one_of, whole
from conftest import ROOT
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from transformers import ViTImageProcessorPil

from benchmarks import visitors
from cbsa_hf import (
    CBSAForImageClassification,
    SlidingWindowSegmenter,
    ZeroShotSegmenter,
    attention_maps,
    default_checkpoint,
    load_checkpoint,
)
from cbsa_hf.interpretability.representatives import trace_representatives
from cbsa_hf.segmentation.images import to_pixel_values
from cbsa_hf.segmentation.inference import encode


META = {"_type": "gradio.FileData"}
MODELS = {"shipped": default_checkpoint(), "street": default_checkpoint("semantic-segmentation")}
ENDPOINTS = {"choices", "segment", "steps", "attention", "inside", "compare", "street", "download"}
REST = ("ncut", 4, False, "")  # the other arguments of `segment`


@pytest.fixture(scope="module")
def uploads(tmp_path_factory):
    """The folder of the uploads."""
    folder = tmp_path_factory.mktemp("uploads").resolve()
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    yield folder
    del os.environ["GRADIO_TEMP_DIR"]


@pytest.fixture(scope="module")
def page(uploads):
    return build_page(looks.Explorer(MODELS))


@pytest.fixture(scope="module")
def server(page, uploads):
    """The address of the running page, and the folder of its uploads."""
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, **SERVER)
    yield url, uploads
    page.close()


@pytest.fixture(scope="module")
def client(server):
    return Client(server[0], verbose=False)


def call(url: str, endpoint: str, *data) -> tuple[str, str]:
    """The kind and the content of the last event with which an endpoint answers."""
    answer = httpx.post(f"{url}gradio_api/call/{endpoint}", json={"data": data}, timeout=60)
    if answer.status_code != 200:
        return "refused", answer.text
    identity = answer.json()["event_id"]
    text = httpx.get(f"{url}gradio_api/call/{endpoint}/{identity}", timeout=60).text
    kind, _, content = text.strip().rpartition("event: ")[2].partition("\n")
    return kind, content.removeprefix("data: ")


def sentence(text: str) -> str:
    """The sentence in an error that `call` returns."""
    message = json.loads(text)
    return message["error"] if isinstance(message, dict) else message


def upload(url: str, name: str, data: bytes) -> str:
    answer = httpx.post(f"{url}gradio_api/upload", files={"files": (name, data)}, timeout=60)
    answer.raise_for_status()
    return answer.json()[0]


def to_bytes(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


FORBIDDEN = [
    "absolute",
    "relative",
    "absent",
    "folder",
    "uploads",
    "pipe",
    "link",
    "climbing",
    "served",
    "fetched",
    "empty",
]


@pytest.fixture(scope="module")
def forbidden(server, tmp_path_factory) -> dict[str, str]:
    """Paths that a visitor must not open, by kind."""
    folder = server[1]
    outside = tmp_path_factory.mktemp("server") / "secret.png"
    Image.new("RGB", (64, 64), "red").save(outside)
    inner = folder / ("ab" * 32)
    inner.mkdir()
    os.mkfifo(inner / "pipe.png")
    (inner / "link.png").symlink_to(outside)
    return {
        "absolute": str(outside),
        "relative": os.path.relpath(outside),
        "absent": str(outside.with_name("absent.png")),
        "folder": str(outside.parent),
        "uploads": str(folder),
        "pipe": str(inner / "pipe.png"),
        "link": str(inner / "link.png"),
        "climbing": f"{inner}/../../{outside.parent.name}/secret.png",
        "served": f"/gradio_api/file={outside}",
        "fetched": "http://127.0.0.1:9/secret.png",
        "empty": "",
    }


@pytest.mark.parametrize("name", FORBIDDEN)
@pytest.mark.parametrize("meta", [None, {"_type": "other"}, META], ids=["bare", "false", "true"])
def test_no_file_of_the_server_is_opened(server, forbidden, name, meta):
    payload = {"path": forbidden[name]} | ({} if meta is None else {"meta": meta})
    start = time.monotonic()
    kind, text = call(server[0], "segment", payload, *REST)
    assert kind == "error"
    assert photos.NOT_UPLOADED in text
    assert forbidden[name] == "" or forbidden[name] not in text
    assert time.monotonic() - start < 20  # opening a pipe without a writer would block


def test_choices_are_answered_in_order(page):
    """All that sets what is shown waits in one queue, so that a slow choice is not answered after a later one."""
    chosen = {"source", "row", "column", "layer", "head", "representative"}
    queues = {
        event.concurrency_id: event.concurrency_limit
        for event in page.fns.values()
        if chosen & {component.elem_id for component in event.outputs}
    }
    assert queues == {"choices": 1}


def test_wrong_number_of_values_is_one_sentence(server):
    kind, text = call(server[0], "segment", "coffee")
    assert kind == "error"
    assert sentence(text) == "This takes 5 values, but got 1."


def test_nested_path_is_found(forbidden):
    nested = {"photo": [{"file": {"path": forbidden["absolute"]}}]}
    with pytest.raises(photos.PhotoError, match="Upload a photo first"):
        photos.admit_files([nested])
    deep = []
    for _ in range(100):
        deep = [deep]
    with pytest.raises(photos.PhotoError, match="nested too deeply"):
        photos.admit_files(deep)
    assert photos.admit_files(["a path", {"row": 3}, None]) == ["a path", {"row": 3}, None]


BAD_FILES = {
    "words.png": b"These are words.",
    "empty.png": b"",
    "page.html": b"<html><body>A page</body></html>",
    "drawing.svg": b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>',
    "phone.heic": b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + bytes(200),
    "long.png": visitors.png_of(60_000, 60),
    "bomb.png": visitors.png_of(30_000, 30_000),
    "cut.png": to_bytes(Image.effect_noise((300, 300), 60))[:9000],
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_one_sentence(server, name):
    path = upload(server[0], name, BAD_FILES[name])
    kind, text = call(server[0], "segment", {"path": path, "meta": META}, *REST)
    message = sentence(text)
    assert kind == "error"
    assert message.startswith(name)
    assert message.count(". ") == 0
    assert message.endswith(".")
    assert "component" not in message.lower()
    assert str(server[1]) not in message


def test_too_large_an_upload_is_refused(server):
    answer = httpx.post(
        f"{server[0]}gradio_api/upload", files={"files": ("huge.png", bytes(photos.MAX_BYTES + 10**6))}, timeout=60
    )
    assert answer.status_code == 413
    assert not list(server[1].rglob("huge.png"))


@pytest.mark.parametrize("format", ["GIF", "TIFF", "WEBP"])
def test_first_of_several_pictures_is_taken_and_named(server, format):
    first, second = Image.new("RGB", (64, 48), "red"), Image.new("RGB", (64, 48), "blue")
    options = {"lossless": True} if format == "WEBP" else {}
    name = f"many.{format.lower()}"
    both = to_bytes(first, format, save_all=True, append_images=[second], **options)
    photo = photos.open_photo(photos.source_of(upload(server[0], name, both)))
    assert photo.image.getpixel((9, 9)) == (255, 0, 0)
    assert photo.remark == f"{name} holds several pictures; this is the first."
    alone = photos.open_photo(photos.source_of(upload(server[0], name, to_bytes(first, format, **options))))
    assert alone.remark == ""


def test_large_photo_is_reduced(server):
    data = to_bytes(Image.effect_noise((4000, 3000), 60), "JPEG")
    photo = photos.open_photo(photos.source_of(upload(server[0], "large.jpg", data)))
    assert photo.image.size == (1280, 960)


@pytest.mark.parametrize("value", [True, float("nan"), float("inf"), "x", -1, 99, 2.5, None, [], {}, "9" * 10**6])
def test_bad_layer_is_one_sentence(value):
    with pytest.raises(photos.PhotoError) as refusal:
        whole(value, "layer", 0, 11)
    message = refusal.value.message
    assert message.startswith("The layer is ")
    assert message.endswith("give a whole number from 0 to 11.")
    assert len(message) < 120


@pytest.mark.parametrize("value", [None, 7, "other", ["mean"], "9" * 10**6])
def test_bad_choice_is_one_sentence(value):
    with pytest.raises(photos.PhotoError, match=r"The head is .*; choose one of mean, 0\."):
        one_of(value, "head", ["mean", "0"])
    with pytest.raises(photos.PhotoError, match="give true or false"):
        flag(value, "sharp")


def test_valid_parameters_are_returned():
    assert whole(3.0, "layer", 0, 11) == 3
    assert one_of("mean", "head", ["mean"]) == "mean"
    assert flag(False, "sharp") is False


@pytest.mark.parametrize("layer", [True, "x", -1, 99])
def test_endpoint_refuses_a_layer(client, layer):
    with pytest.raises(AppError, match=r"The layer is .*give a whole number from 0 to 11"):
        client.predict(layer=layer, api_name="/attention")


def test_segments_of_an_upload_are_those_of_the_library(client, tmp_path):
    photo = Image.fromarray(skimage.data.chelsea())
    photo.save(tmp_path / "cat.png")
    answer = client.predict(photo=handle_file(tmp_path / "cat.png"), num_segments=3, api_name="/segment")
    found = ZeroShotSegmenter(*load_checkpoint(), num_segments=3)(photo)
    mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["mask_png"]))))
    labels = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["labels_png"]))))
    assert (answer["width"], answer["height"]) == photo.size
    assert np.array_equal(mask == 255, found.mask)
    assert np.array_equal(labels, found.labels)
    assert [segment["score"] for segment in answer["segments"]] == pytest.approx([s.score for s in found.segments])
    rows, columns = answer["grid"]
    height, width = found.labels.shape
    assert answer["labels"][3][5] == found.labels[int(3.5 * height / rows), int(5.5 * width / columns)]


@pytest.mark.parametrize("patch", [None, (4, 7)])
def test_attention_is_that_of_the_library(client, patch):
    row, column = patch or (-1, -1)
    answer = client.predict(photo="chelsea", layer=5, head=1, row=row, column=column, api_name="/attention")
    model, processor = load_checkpoint()
    pixel_values = to_pixel_values(Image.fromarray(skimage.data.chelsea()), processor, 256, 8)
    expected = attention_maps(model, pixel_values, patch)[5, 0, 1].numpy()
    assert answer["values"] == pytest.approx(expected, rel=1e-3)


def test_steps_are_those_of_the_library(client):
    answer = client.predict(photo="chelsea", layer=4, head=2, row=7, column=3, representative=20, api_name="/steps")
    model, processor = load_checkpoint()
    pixel_values = to_pixel_values(Image.fromarray(skimage.data.chelsea()), processor, 256, 8)
    trace = trace_representatives(encode(model, pixel_values, steps_of=[4]), 4)
    expected = {
        "readers": trace.reads[2, :, 7, 3].reshape(8, 8),
        "reads": trace.reads[2, 20],
        "writes": trace.writes[2, 20],
        "update": trace.update[2],
        "similarity": trace.similarity[2],
        "moved_by_reading": trace.moved_by_reading[2],
        "moved_by_contraction": trace.moved_by_contraction[2],
    }
    assert answer["grid"] == list(trace.update.shape[1:])
    assert answer["representatives"] == [8, 8]
    for name, values in expected.items():
        assert np.asarray(answer[name]) == pytest.approx(values.numpy(), rel=1e-3, abs=1e-6), name


def test_two_models_are_compared(client):
    answer = client.predict("street", "shipped", photo="chelsea", num_segments=3, api_name="/compare")
    assert list(answer) == ["street", "shipped"]
    for name, found in answer.items():
        expected = ZeroShotSegmenter(*load_checkpoint(MODELS[name]), num_segments=3)(
            Image.fromarray(skimage.data.chelsea())
        )
        mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(found["mask_png"]))))
        assert np.array_equal(mask == 255, expected.mask)


def test_classes_of_a_street_are_those_of_the_library(client, tmp_path):
    photo = Image.fromarray(skimage.data.chelsea()).resize((96, 64))
    photo.save(tmp_path / "small.png")
    answer = client.predict(handle_file(tmp_path / "small.png"), flip=False, api_name="/street")
    expected = SlidingWindowSegmenter(*load_checkpoint(task="semantic-segmentation"), flip=False)(photo)
    labels = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["labels_png"]))))
    assert np.array_equal(labels, expected)
    assert len(answer["classes"]) == 11
    for entry in answer["classes"]:
        assert entry["share"] == pytest.approx((expected == entry["index"]).mean())


def test_downloads_equal_what_is_shown(client):
    def file(kind: str) -> io.BytesIO:
        answer = client.predict(kind, "chelsea", row=4, column=7, api_name="/download")
        assert answer["name"] == f"chelsea-{kind}.{'npz' if kind == 'maps' else 'png'}"
        with urllib.request.urlopen(answer["uri"]) as opened:
            return io.BytesIO(opened.read())

    shown = client.predict("chelsea", api_name="/segment")
    for kind, name in {"mask": "mask_png", "segments": "labels_png"}.items():
        expected = np.asarray(Image.open(io.BytesIO(base64.b64decode(shown[name]))))
        found = Image.open(file(kind))
        assert np.array_equal(np.asarray(found.convert("L") if kind == "mask" else found), expected)
    row = client.predict("chelsea", layer=5, head=1, row=4, column=7, api_name="/attention")["values"]
    with np.load(file("maps")) as arrays:
        assert arrays["map_of_patch"][5, 1] == pytest.approx(np.asarray(row), rel=1e-3)


def test_choices_are_listed(client):
    answer = client.predict(api_name="/choices")
    assert set(answer["photos"]) == set(photos.EXAMPLES)
    assert list(answer["models"]) == list(MODELS)
    assert answer["models"]["shipped"] == {
        "attention_types": ["cbsa"] * 12,
        "num_heads": 3,
        "representatives": [8, 8],
    }
    with pytest.raises(AppError, match="The kind is 'all'; choose one of mask, segments, maps"):
        client.predict("all", api_name="/download")


@pytest.mark.parametrize("name", ["absolute", "relative", "absent", "folder"])
def test_no_folder_of_the_server_is_a_model(client, forbidden, name):
    with pytest.raises(AppError, match=r"There is no such model; choose one of shipped, street\.$"):
        client.predict(model=forbidden[name], api_name="/inside")


def test_request_that_is_too_long_or_without_length_is_refused(server):
    def answer(**content) -> int:
        return httpx.post(f"{server[0]}gradio_api/call/inside", timeout=60, **content).status_code

    assert answer(content=iter([b'{"data": ["coffee", ""]}'])) == 411
    assert answer(content=bytes(admission.MAX_BODY + 1)) == 413
    assert answer(json={"data": ["coffee", ""]}) == 200


def test_oldest_uploads_are_removed(server, monkeypatch):
    paths = [Path(upload(server[0], f"{name}.png", name.encode() * 1000)) for name in "abc"]
    for age, path in enumerate(paths):
        os.utime(path, (10**9 + age, 10**9 + age))
    others = sum(file.lstat().st_size for file in server[1].glob("*/*") if file not in paths)
    monkeypatch.setattr(admission, "MAX_UPLOADS", others + 2600)
    admission.make_room(needed=500)
    assert [path.exists() for path in paths] == [False, True, True]


def test_endpoints_are_named_and_described(client):
    endpoints = client.view_api(print_info=False, return_format="dict")["named_endpoints"]
    assert set(endpoints) == {f"/{name}" for name in ENDPOINTS}
    for endpoint in endpoints.values():
        assert endpoint["description"]
        for parameter in endpoint["parameters"]:
            assert parameter["parameter_has_default"] or parameter["parameter_name"] in ("model", "other")


def test_agent_lists_and_calls_tools(server):
    import anyio
    from mcp import ClientSession
    from mcp.client.streamable_http import streamable_http_client

    path = upload(server[0], "cat.png", to_bytes(Image.fromarray(skimage.data.chelsea())))

    async def ask():
        async with (
            streamable_http_client(f"{server[0]}gradio_api/mcp/") as (reader, writer, _),
            ClientSession(reader, writer) as session,
        ):
            await session.initialize()
            tools = {tool.name: tool for tool in (await session.list_tools()).tools}
            uploaded = f"{server[0]}gradio_api/file={path}"
            return tools, [
                await session.call_tool("inside", {"photo": "chelsea"}),
                await session.call_tool("inside", {"photo": uploaded}),
                await session.call_tool("inside", {"photo": "/etc/passwd"}),
            ]

    tools, (example, uploaded, forbidden) = anyio.run(ask)
    assert set(tools) == ENDPOINTS
    for tool in tools.values():
        assert all(field["description"] for field in tool.inputSchema["properties"].values())
    assert "probability" in example.content[0].text
    assert uploaded.content[0].text == example.content[0].text
    assert forbidden.isError
    assert photos.NOT_UPLOADED in forbidden.content[0].text


def test_same_requests_share_one_computation():
    kept, computed = looks.Kept(2), []

    def compute():
        time.sleep(0.2)
        computed.append(None)
        return len(computed)

    threads = [threading.Thread(target=kept.get, args=("a", compute)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(computed) == 1
    assert kept.get("a", compute) == 1


def test_last_used_results_are_kept():
    kept = looks.Kept(2)
    for key in "abac":
        kept.get(key, lambda key=key: key.upper())
    assert list(kept.results) == ["a", "c"]


def test_failed_computation_is_not_kept():
    kept = looks.Kept(2)
    with pytest.raises(ZeroDivisionError):
        kept.get("a", lambda: 1 / 0)
    assert not kept.results
    assert kept.get("a", lambda: 5) == 5


def test_code_of_the_page_and_of_its_guide_runs(server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(skimage.data.coffee()).save("photo.jpg")
    guide = (ROOT / "docs" / "guides" / "demo.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```py\n(.*?)^```", guide, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 1
    for code in (text.CODE, text.CLIENT, *blocks):
        exec(compile(code.replace("http://127.0.0.1:7860", server[0]), "page", "exec"), {})
    assert capsys.readouterr().out.count("'score'") == 2 * 4
    assert json.loads(text.AGENT)["mcpServers"]["cbsa"]["url"].endswith("/gradio_api/mcp/")


def test_street_scenes_run_on_a_zerogpu(monkeypatch):
    decorated = []

    def decorate(function):
        decorated.append(function.__name__)
        return function

    monkeypatch.setitem(sys.modules, "spaces", SimpleNamespace(GPU=decorate))
    spec = importlib.util.spec_from_file_location("cbsa_demo.looks_on_a_space", looks.__file__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert decorated == ["segment_street"]


def test_layers_without_representatives_say_so(tiny_config, tmp_path):
    tiny_config.attention_type = ["cbsa", "mssa", "linear"]
    CBSAForImageClassification(tiny_config).save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 32, "width": 48}, do_convert_rgb=True).save_pretrained(tmp_path)
    answer = Answers(looks.Explorer({"mixed": str(tmp_path), "shipped": default_checkpoint()}))
    assert "<img" in answer.steps("coffee", "mixed", 0, "mean", 5, 13, 4)
    said = answer.steps("coffee", "mixed", 1, "mean", 5, 13, 4)
    assert "The attention type of layer 1 is mssa. It has no representatives" in said
    exact = answer.glance("coffee", "mixed", 5, 13, "CLS", "exact", False)
    assert exact.count("<td>none</td>") == 2 * 3  # two layers, the mean and two heads
    assert "none" in answer.inside("coffee", "mixed")
    both = answer.compare("coffee", "mixed", "shipped", "ncut", 4, False, 1, "mean", 5, 13)
    assert "Left <b>mixed</b> (cbsa, mssa, linear), right <b>shipped</b> (cbsa)." in both
    assert both.count("<img") == 4
    assert answer.explorer.card("mixed") == "This model has no model card."


@pytest.mark.parametrize("source", ["../secret.png", "/etc/passwd", "ab/..", "rockets", None, 7, "x" * 10**6])
def test_no_other_source_is_opened(source):
    with pytest.raises(photos.PhotoError, match="Upload a photo first"):
        photos.open_photo(source)


def test_unknown_model_is_one_sentence():
    with pytest.raises(photos.PhotoError, match="There is no such model; choose one of shipped"):
        looks.Explorer({"shipped": "nowhere"}).look("coffee", "hub/model")


def test_bad_checkpoints_of_the_command_are_one_sentence(tmp_path, capsys):
    for parent in ("a", "b"):
        (tmp_path / parent / "mine").mkdir(parents=True)
    first, second = (str(tmp_path / parent / "mine") for parent in ("a", "b"))
    assert app.name_for_visitors(first) == "mine"
    assert app.name_for_visitors("someone/mine") == "someone/mine"
    assert app.main(["--checkpoint", first, "--checkpoint", second]) == 2
    assert capsys.readouterr().err == (
        "app.py: Two checkpoints have the same name; visitors could not tell them apart.\n"
    )
    assert app.main(["--checkpoint", first]) == 2
    assert re.fullmatch(r"app\.py: .*mine.*\.\n", capsys.readouterr().err)


def test_sessions_leave_little_disk_and_memory(server, tmp_path, monkeypatch):
    folder, photos_of_visitors = server[1], [visitors.save_photo(tmp_path, 400 + side, 300) for side in range(5)]
    largest = max(path.stat().st_size for path in photos_of_visitors)
    monkeypatch.setattr(admission, "MAX_UPLOADS", 3 * largest)
    before = visitors.memory(os.getpid())
    visitors.come_and_go(server[0], photos_of_visitors)
    assert visitors.disk(folder) * 10**6 <= 3 * largest
    assert visitors.memory(os.getpid()) - before < 300


def test_decompression_bombs_take_little_memory(server, tmp_path):
    photo = visitors.save_photo(tmp_path, 400, 300)
    visitors.come_and_go(server[0], [photo])
    files = {"refused.png": visitors.png_of(30_000, 30_000), "largest.png": visitors.png_of(5_000, 5_000, 16, 6)}
    before = visitors.memory(os.getpid())
    visitors.forget_peak(os.getpid())
    visitors.bombard(server[0], files, photo)  # raises if an answer is not as expected
    assert visitors.memory(os.getpid(), "VmHWM") - before < 300

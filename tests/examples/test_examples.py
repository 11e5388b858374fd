"""The examples, with few training steps: their scenes, scores, and losses that fall."""

import numpy as np
import pytest
import torch

from examples import captioning, depth, detection
from examples.encoders import ENCODERS
from examples.scenes import CUTOUTS, NAMES, Scene, cut_out, draw_scenes


def test_boxes_and_captions_describe_the_scene():
    """Boxes lie inside the image and around all coloured pixels, and captions are true."""
    scenes = draw_scenes(40, seed=3)
    assert [scene.caption for scene in scenes] == [scene.caption for scene in draw_scenes(40, seed=3)]
    assert {name for scene in scenes for name in scene.names} == set(NAMES) == set(CUTOUTS)
    for scene in scenes:
        pixels = np.asarray(scene.image).astype(int)
        coloured = np.ptp(pixels, axis=2) > 0  # the textures are grey
        inside = np.zeros(coloured.shape, bool)
        for left, top, right, bottom in scene.boxes:
            assert 0 <= left < right <= 96 and 0 <= top < bottom <= 96
            inside[top:bottom, left:right] = True
            assert coloured[top:bottom, left:right].mean() > 0.4  # an ellipse fills pi / 4
        assert not coloured[~inside].any()
        if len(scene.names) == 1:
            assert scene.caption == f"a {scene.names[0]}"
        else:
            first, second = scene.boxes
            words = scene.caption.split()
            assert [words[1], words[-1]] == scene.names
            assert (first[2] <= second[0]) if "left" in words else (first[3] <= second[1])
    rocket = np.asarray(cut_out("rocket"))
    assert (rocket[..., 3] > 0).mean() == pytest.approx(np.pi / 4, abs=0.01)


def test_average_precision():
    """Against values computed by hand, with a duplicate detection and a wrong class."""
    image = draw_scenes(1, seed=0)[0].image
    boxes = np.array([[0, 0, 10, 10], [20, 20, 40, 40], [50, 50, 60, 90]])
    scenes = [Scene(image, [NAMES[0], NAMES[0], NAMES[1]], boxes, "")]

    def score(*detections):
        scores, labels, found = zip(*detections, strict=True)
        result = {"scores": torch.tensor(scores), "labels": torch.tensor(labels)}
        return detection.average_precision([{**result, "boxes": torch.tensor(found, dtype=torch.float32)}], scenes)

    right = (0.5, 1, boxes[2].tolist())
    assert score((0.9, 0, [0, 0, 10, 10]), (0.8, 0, [20, 20, 40, 40]), right) == 1
    # Precision at the two hits: 1 and 2 / 3.
    assert score((0.9, 0, [0, 0, 10, 10]), (0.8, 0, [0, 0, 10, 9]), (0.7, 0, [20, 20, 40, 40]), right) == (
        pytest.approx((1 + (1 + 2 / 3) / 2) / 2)
    )
    # An IoU of 100 / 200 is a hit; one of 90 / 210, or a box of another class, is none.
    assert score((0.9, 0, [0, 0, 10, 20]), right) == pytest.approx((1 + 1 / 2) / 2)
    assert score((0.9, 0, [0, 1, 10, 21]), (0.8, 1, boxes[1].tolist()), (0.1, *right[1:])) == (0 + 1 / 2) / 2


def losses(capsys) -> list[float]:
    """The losses that an example printed."""
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    return [float(line.rsplit(" ", 1)[1]) for line in lines]


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize(
    ("example", "steps", "scores"),
    [
        (detection, 6, {"AP50", "AP75"}),
        (captioning, 6, {"exact captions"}),
        (depth, 6, {"mean absolute error", "the same of the median"}),
    ],
    ids=["detection", "captioning", "depth"],
)
def test_loss_of_every_example_falls(example, steps, scores, encoder, capsys):
    result = example.main([f"--encoder={encoder}", "--num_images=2", f"--num_steps={steps}"])
    assert set(result) == scores
    assert all(0 <= value <= 1 for value in result.values())
    found = losses(capsys)
    assert len(found) == steps
    assert min(found[1:]) < found[0]


def test_costs_are_compared(monkeypatch):
    monkeypatch.setattr("examples.encoders.ROUNDS", 1)
    result = detection.main(["--cost", "--num_images=1"])
    assert list(result) == ["training step, CBSA / ViT", "inference, CBSA / ViT"]
    assert all(value > 0 for value in result.values())

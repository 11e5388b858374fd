"""
Object detection: DETR of Transformers on a CBSA backbone learns 16 scenes.

    python examples/detection.py
    python examples/detection.py --encoder vit
    python examples/detection.py --cost
"""

import numpy as np
import torch
from transformers import DetrConfig, DetrForObjectDetection, DetrImageProcessorPil

from examples.encoders import ENCODERS, compare_cost, encoder_config, parse_options, train
from examples.scenes import NAMES, Scene, draw_scenes, to_pixel_values


NUM_STEPS = 2400


def build_detector(encoder: str) -> DetrForObjectDetection:
    """A small DETR with random weights."""
    # DETR freezes the batch norms of its backbone: a new encoder learns better with an embedding that has none.
    values = {"patch_embedding_type": "patchify"} if encoder == "cbsa" else {}
    config = DetrConfig(
        backbone_config=encoder_config(encoder, **values),
        num_queries=8,
        d_model=64,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        dropout=0.0,
        auxiliary_loss=True,
        id2label=dict(enumerate(NAMES)),
        label2id={name: index for index, name in enumerate(NAMES)},
    )
    return DetrForObjectDetection(config)


def to_labels(scenes: list[Scene]) -> list[dict[str, torch.Tensor]]:
    """What DETR is trained with: class indices, and boxes as (centre, size) relative to the image."""
    labels = []
    for scene in scenes:
        boxes = torch.from_numpy(scene.boxes).float() / scene.image.width
        start, end = boxes[:, :2], boxes[:, 2:]
        classes = torch.tensor([NAMES.index(name) for name in scene.names])
        labels.append({"class_labels": classes, "boxes": torch.cat([(start + end) / 2, end - start], dim=1)})
    return labels


@torch.no_grad()
def detect(model: DetrForObjectDetection, scenes: list[Scene]) -> list[dict[str, torch.Tensor]]:
    """`scores`, `labels` and `boxes` of every query for each scene, in pixels."""
    outputs = model.eval()(to_pixel_values([scene.image for scene in scenes]))
    sizes = [(scene.image.height, scene.image.width) for scene in scenes]
    return DetrImageProcessorPil().post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)


def overlap(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of a box (4,) with others (n, 4) -> (n,)."""
    start, end = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    shared = np.prod(np.clip(end - start, 0, None), axis=1)
    areas = np.prod(others[:, 2:] - others[:, :2], axis=1) + np.prod(box[2:] - box[:2])
    return shared / (areas - shared)


def average_precision(found: list[dict[str, torch.Tensor]], scenes: list[Scene], min_overlap: float = 0.5) -> float:
    """
    The mean over the classes of the area below the curve of precision over recall. A detection is right if it overlaps
    an object of its class, that no detection with a higher score has taken, by at least `min_overlap`.

    Args:
        found: what [`detect`] returns.
        scenes: what is there.
        min_overlap: intersection over union.
    """
    averages = []
    for label, name in enumerate(NAMES):
        truth = [scene.boxes[[n == name for n in scene.names]] for scene in scenes]
        total = sum(map(len, truth))
        if total == 0:
            continue
        candidates = [
            (score.item(), image, box.numpy())
            for image, result in enumerate(found)
            for score, kind, box in zip(result["scores"], result["labels"], result["boxes"], strict=True)
            if kind == label
        ]
        taken, hits = [np.zeros(len(boxes), bool) for boxes in truth], []
        for _, image, box in sorted(candidates, key=lambda candidate: -candidate[0]):
            overlaps = np.where(taken[image], 0, overlap(box, truth[image]))
            best = overlaps.argmax() if len(overlaps) else None
            hits.append(best is not None and overlaps[best] >= min_overlap)
            if hits[-1]:
                taken[image][best] = True
        hits = np.array(hits, dtype=float)
        precision = hits.cumsum() / np.arange(1, len(hits) + 1)
        precision = np.maximum.accumulate(precision[::-1])[::-1]  # at this recall or a larger one
        averages.append((precision * hits).sum() / total)
    return float(np.mean(averages))


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train and score, or compare costs; returns the numbers."""
    args = parse_options(__doc__, NUM_STEPS, argv)
    scenes = draw_scenes(args.num_images, args.seed)
    pixel_values, labels = to_pixel_values([scene.image for scene in scenes]), to_labels(scenes)
    torch.manual_seed(args.seed)
    if args.cost:
        models = {name: build_detector(name).train() for name in ENCODERS}
        steps = {n: lambda m=m: m(pixel_values, labels=labels).loss.backward() for n, m in models.items()}
        result = {"training step, CBSA / ViT": compare_cost(steps)}
        with torch.no_grad():
            steps = {n: lambda m=m: m.eval()(pixel_values) for n, m in models.items()}
            result["inference, CBSA / ViT"] = compare_cost(steps)
    else:
        model = build_detector(args.encoder)
        train(model, lambda: model(pixel_values, labels=labels).loss, args.num_steps, learning_rate=1e-3)
        result = {
            "AP50": average_precision(detect(model, scenes), scenes),
            "AP75": average_precision(detect(model, scenes), scenes, min_overlap=0.75),
        }
    for name, value in result.items():
        print(f"{name}: {value:.3f}")
    return result


if __name__ == "__main__":
    main()

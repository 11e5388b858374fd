"""
What one training image costs, and from that what a run on ImageNet-1K takes on many GPUs.

    python benchmarks/large_runs.py
    python benchmarks/large_runs.py --config_names cbt-small --images_per_second 1500

Operations, bytes for the backward pass and the processor's time for reading a photo are measured here, without a GPU.
The images per second of one GPU are given, as `benchmarks/training_throughput.py` prints them there, or follow
from an assumed rate of operations.
"""

import io
import time
from dataclasses import dataclass, field

import numpy as np
import skimage.data
import torch
from accelerate import PartialState
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel, ViTImageProcessorPil

from cbsa_hf import preset_path
from training.arguments import parse_arguments
from training.compare import count_flops
from training.data.classification import TrainingImages
from training.engine.interruption import exit_with_a_sentence


IMAGES, IMAGE_BYTES = 1_281_167, 147_897_477_120 // 1_281_167  # of ImageNet-1K's training split, in its archive
PHOTO_SIZE = (500, 375)  # pixels, the usual size in ImageNet
STATE_BYTES = 16  # of a weight, in float32: itself, its gradient, and AdamW's two averages


@dataclass(kw_only=True)
class Arguments:
    """Options of the script."""

    _argument_group_name = "the run"

    config_names: list[str] = field(
        default_factory=lambda: ["cbt-tiny", "cbt-small", "cbt-base"], metadata={"help": "models, as in `pretrain.py`"}
    )
    gpus: list[int] = field(default_factory=lambda: [8, 32], metadata={"help": "numbers of GPUs"})
    images_per_second: float | None = field(
        default=None, metadata={"help": "of one GPU in training; default: as many as `--teraflops` allow"}
    )
    teraflops: float = field(default=100.0, metadata={"help": "of one GPU in training, in 10^12 operations a second"})
    batch_size: int = field(default=1024, metadata={"help": "images per step, over all GPUs together"})
    num_epochs: int = field(default=300, metadata={"help": "passes over the training split"})


def saved_bytes(model: PreTrainedModel, side: int) -> float:
    """Bytes that the forward pass of one image keeps for the backward pass, in bfloat16 autocast, without weights."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def count(batch: int) -> int:
        storages = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage.nbytes(), tensor  # held, so that no other takes its address
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
            model(torch.zeros(batch, 3, side, side))
        return sum(size for size, _ in storages.values())

    return (count(3) - count(1)) / 2  # the casts of the weights, which any batch shares, cancel out


def reading_seconds(side: int, count: int = 64) -> float:
    """Processor seconds of one core to decode, crop and resize one photo."""
    photo = Image.fromarray(skimage.data.coffee()).resize(PHOTO_SIZE)
    file = io.BytesIO()
    photo.save(file, "JPEG", quality=95)
    rows = {"image": [{"bytes": file.getvalue(), "path": None}] * count, "label": [0] * count}
    dataset = Dataset.from_dict(rows, features=Features({"image": ImageFeature(), "label": ClassLabel(names=["x"])}))
    processor = ViTImageProcessorPil(size={"height": side, "width": side})
    images = TrainingImages(dataset, 0, processor, [side], num_epochs=1, min_crop_scale=0.25, seed=0)
    images[0]
    started = time.process_time()
    for index in range(count):
        images[index]
    return (time.process_time() - started) / count


def main(args: Arguments):
    """Measure every model, and print both tables."""
    PartialState(cpu=True)
    side = 224
    reading = reading_seconds(side)
    print(f"Reading one photo of {PHOTO_SIZE[0]} x {PHOTO_SIZE[1]} pixels: {1000 * reading:.1f} ms of one core.\n")
    print("| model | parameters | operations a step | kept for the backward pass | state |\n|---|---|---|---|---|")
    runs = []
    for name in args.config_names:
        config = AutoConfig.from_pretrained(preset_path(name))
        model = AutoModelForImageClassification.from_config(config).eval()
        parameters = sum(weight.numel() for weight in model.parameters())
        flops = 3 * count_flops(model, torch.zeros(1, 3, side, side))  # the backward pass takes twice the forward one
        kept = saved_bytes(model.train(), side)
        state = STATE_BYTES * parameters
        print(f"| `{name}` | {parameters:,} | {flops / 1e9:.1f} G | {kept / 1e6:.0f} MB | {state / 1e9:.2f} GB |")
        rate = args.images_per_second or args.teraflops * 1e12 / flops
        for gpus in args.gpus:
            total = rate * gpus
            row = [f"`{name}`", gpus, f"{rate:,.0f}", f"{total:,.0f}"]
            row.append(f"{args.num_epochs * IMAGES / total / 3600:.1f} h")
            row += [f"{total * IMAGE_BYTES / 1e9:.2f} GB/s", int(np.ceil(total * reading / gpus))]
            row.append(f"{(state + kept * args.batch_size / gpus) / 1e9:.1f} GB")
            runs.append(row)
    print(f"\nBatch {args.batch_size}, {args.num_epochs} epochs:\n")
    print("| model | GPUs | images/s of one | of all | run | input | cores for each GPU | memory of each GPU |")
    print("|" + "---|" * 8)
    for row in runs:
        print(f"| {' | '.join(map(str, row))} |")


if __name__ == "__main__":
    with exit_with_a_sentence():
        main(parse_arguments(Arguments))

"""
Measure the accuracy of a classifier at several image sizes, with and without the size factor N / N0, and draw both.

    python benchmarks/size_factor.py --dataset_name ../shared/data/imagenette-128

Both models have the same weights; only the configuration's `size_factor` differs. `docs/size-factor.md` explains the
factor.
"""

from dataclasses import dataclass, field

from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import HfArgumentParser

from benchmarks.workbench import table
from cbsa_hf import CBSAForImageClassification, load_checkpoint
from cbsa_hf.interpretability.plots import line_panels
from training.data.classification import ValidationImages
from training.data.loading import find_columns, find_split, load_images
from training.evaluation.scores import evaluate_classifier


TITLES = {True: "with N / N0", False: "without, as the reference implementation"}


@dataclass
class Arguments:
    """The options of this script."""

    dataset_name: str = field(metadata={"help": "labelled images, by hub id or folder"})
    split: str = field(default="validation", metadata={"help": "split to score on"})
    checkpoint: str | None = field(default=None, metadata={"help": "folder or hub id; default: the shipped one"})
    sizes: list[int] = field(
        default_factory=lambda: [96, 128, 160, 192, 224, 256], metadata={"help": "sides of the images in pixels"}
    )
    every: int = field(default=1, metadata={"help": "use every n-th image, which takes less time"})
    output: str = field(default="docs/size-factor.png", metadata={"help": "picture to write"})


def main(args: Arguments):
    """Print a table of the accuracy at each image size, with and without the size factor."""
    model, processor = load_checkpoint(args.checkpoint, "image-classification")
    dataset = find_split(load_images(args.dataset_name), args.split)
    dataset = dataset.select_columns(find_columns(dataset)).select(range(0, len(dataset), args.every))
    accelerator = Accelerator()
    accuracies = {}
    for factor, title in TITLES.items():
        model.config.size_factor = factor
        changed = CBSAForImageClassification(model.config).eval()
        changed.load_state_dict(model.state_dict())
        changed.to(accelerator.device)
        for size in args.sizes:
            processor.size = {"height": size, "width": size}
            loader = accelerator.prepare(DataLoader(ValidationImages(dataset, 0, processor), batch_size=64))
            metrics = evaluate_classifier(
                lambda pixel_values, model=changed: model(pixel_values, interpolate_pos_encoding=True).logits,
                loader,
                accelerator,
            )
            accuracies.setdefault(title, []).append(metrics["accuracy"])
    print(table(["pixels", *args.sizes], [[title, *(f"{a:.3f}" for a in row)] for title, row in accuracies.items()]))
    panel = {"title": "The same weights", "x": "side of the images in pixels", "y": "accuracy"}
    panel |= {"positions": args.sizes, "lines": {title: [row] for title, row in accuracies.items()}}
    line_panels([panel], width=5.5, height=3.6).save(args.output)


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])

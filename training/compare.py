"""
Train members of the family with the same budget and seeds, and write a table of their scores and costs.

    accelerate launch training/compare.py --config training/recipes/comparison.yaml --output_dir runs/comparison \
        --dataset_name ../shared/data/imagenette-128 --masks_name ../shared/data/coco128-seg

`--members` chooses other members than the family. The script takes the options of `pretrain.py`, except those that
differ from run to run. It skips runs that are done and resumes runs that were interrupted. To measure throughput, the
members take turns, and the median over the turns counts. Zero-shot segmentation is scored by the intersection over
union of the foreground, for two methods: `ncut` with its default affinity, and `attention`, which uses the attention
of CLS only.
"""

import json
import statistics
import time
from contextlib import nullcontext
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from cbsa_hf import load_checkpoint
from training import pretrain
from training.arguments import MEMBERS, ComparisonArguments, PretrainingArguments, parse_arguments
from training.data.loading import find_mask_columns, find_split, load_images
from training.data.segmentation import SegmentationDataset
from training.engine.interruption import exit_with_a_sentence
from training.engine.output import open_output, write_file
from training.engine.run_state import CHECKPOINTS
from training.evaluation.zero_shot import build_segmenters, evaluate_zero_shot, model_results


METHODS = {"zero-shot IoU, ncut": "ncut", "zero-shot IoU, attention": "attention"}  # by column of the table
TURNS = 5


def train_member(args: ComparisonArguments, member: str, seed: int) -> Path:
    """The folder of a trained model. It is trained first, unless it is done."""
    folder = Path(args.output_dir) / f"{member}-{seed}"
    if not (folder / "results.json").exists():
        resume = "last" if list(folder.glob(CHECKPOINTS)) else None
        own = {**MEMBERS[member], "seed": seed, "output_dir": str(folder), "resume_from_checkpoint": resume}
        known = {option.name for option in fields(PretrainingArguments)}
        common = {name: value for name, value in vars(args).items() if name in known}
        torch.compiler.reset()  # torch limits compiled variants over all members, and runs uncompiled beyond
        pretrain.main(PretrainingArguments(**common | own))
    return folder


def count_flops(model: PreTrainedModel, pixel_values: torch.Tensor) -> int:
    """Floating-point operations of the matrix products and convolutions of one forward pass; a multiply-add is two."""
    # With separate products for attention: the counter does not know the CPU's fused kernel.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(pixel_values)
    return counter.get_total_flops()


def images_per_second(models: dict[str, PreTrainedModel], pixel_values: torch.Tensor, train: bool) -> dict[str, float]:
    """
    Throughput of each model, the median over turns that the models take.

    Args:
        models: by name.
        pixel_values: (batch, channels, height, width).
        train: whether a turn includes the backward pass and a step of an optimiser.
    """
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=1e-6) for name, model in models.items()}
    labels = torch.zeros(len(pixel_values), dtype=torch.long, device=pixel_values.device)

    def run(name: str) -> float:
        synchronise = torch.cuda.synchronize if pixel_values.is_cuda else lambda: None
        synchronise()
        started = time.perf_counter()
        with torch.set_grad_enabled(train):
            logits = models[name](pixel_values).logits
            if train:
                F.cross_entropy(logits, labels).backward()
                optimizers[name].step()
                optimizers[name].zero_grad()
        synchronise()
        return len(pixel_values) / (time.perf_counter() - started)

    rates = {name: [] for name in models}
    for turn in range(TURNS + 1):
        for name in models:
            rate = run(name)
            if turn > 0:  # the first turn warms up
                rates[name].append(rate)
    return {name: statistics.median(values) for name, values in rates.items()}


def load_masks(args: ComparisonArguments) -> SegmentationDataset:
    """The images with masks that zero-shot segmentation is scored on."""
    split = find_split(load_images(args.masks_name), args.masks_split)
    split = split.select_columns(find_mask_columns(split))
    return SegmentationDataset(split, args.max_corrupt, num_labels=256, reduce_labels=False)


def zero_shot_scores(folder: Path, images: SegmentationDataset) -> dict[str, float]:
    """Mean intersection over union of the foreground by method, for the model in a folder."""
    model, processor = load_checkpoint(str(folder))
    segmenters = build_segmenters(model.to(PartialState().device), processor)
    chosen = {name: segmenters[name] for name in METHODS.values()}
    return evaluate_zero_shot(partial(model_results, chosen), images.readable())


def write_table(rows: dict[str, dict], path: Path):
    """Write the rows as Markdown; over several seeds, mean and standard deviation."""

    def show(values: list[float]) -> str:
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.3f}{spread}"

    first = next(iter(rows.values()))
    scored = [name for name in ("accuracy", "mean_average_precision", *METHODS) if name in first]
    lines = [f"| member | {' | '.join(scored)} | parameters | GFLOPs | images/s, training | images/s, inference |"]
    lines.append("|---" * (5 + len(scored)) + "|")
    for name, row in rows.items():
        cells = [show(row[column]) for column in scored]
        cells += [
            f"{row['parameters']:,}",
            f"{row['flops'] / 1e9:.2f}",
            f"{row['training']:.0f}",
            f"{row['inference']:.0f}",
        ]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    write_file(path, "\n".join(lines) + "\n")


def measure_costs(args: ComparisonArguments, folders: dict[str, list[Path]]) -> dict[str, dict[str, float]]:
    """Parameters, operations per image and throughput of each member, by its name."""
    device = PartialState().device
    models = {name: load_checkpoint(str(paths[0]))[0].to(device) for name, paths in folders.items()}
    size = next(iter(models.values())).config.image_size
    pixel_values = torch.randn(args.batch_size, 3, size, size, device=device)
    training = images_per_second({name: model.train() for name, model in models.items()}, pixel_values, train=True)
    inference = images_per_second({name: model.eval() for name, model in models.items()}, pixel_values, train=False)
    return {
        name: {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "flops": count_flops(model, pixel_values[:1]),
            "training": training[name],
            "inference": inference[name],
        }
        for name, model in models.items()
    }


def score_members(
    folders: dict[str, list[Path]], masks: SegmentationDataset | None
) -> dict[str, dict[str, list[float]]]:
    """Accuracy and, if there are masks, zero-shot scores of each member by its name: one number for each seed."""
    rows = {}
    for name, paths in folders.items():
        results = [json.loads((path / "results.json").read_text()) for path in paths]
        metric = next(iter(results[0]["metrics"]))
        rows[name] = {metric: [result["metrics"][metric] for result in results]}
        if masks is not None:
            scores = [zero_shot_scores(path, masks) for path in paths]
            rows[name] |= {column: [score[method] for score in scores] for column, method in METHODS.items()}
    return rows


def main(args: ComparisonArguments):
    """Train all members, measure them, and write the table."""
    with open_output(args.output_dir) if PartialState().is_main_process else nullcontext():
        masks = None if args.masks_name is None else load_masks(args)  # tells what is wrong with them before training
        folders = {name: [train_member(args, name, seed) for seed in args.seeds] for name in args.members}
        if not PartialState().is_main_process:
            return
        costs, scores = measure_costs(args, folders), score_members(folders, masks)
        rows = {name: scores[name] | costs[name] for name in args.members}
        output_dir = Path(args.output_dir)
        write_file(output_dir / "comparison.json", json.dumps(rows, indent=2) + "\n")
        write_table(rows, output_dir / "comparison.md")
        print((output_dir / "comparison.md").read_text())


if __name__ == "__main__":
    with exit_with_a_sentence():
        main(parse_arguments(ComparisonArguments))

"""The data and models that the claims are checked with, and the findings: verdicts, tables and pictures."""

import statistics
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from transformers import BaseImageProcessor, PreTrainedModel

from benchmarks.small_models import Recipe, Thumbnails, fine_tuned, make_thumbnails, small_model
from training.data.loading import find_columns, find_split, load_images


HOLDS, FAILS, OPEN, NOT_RUN = "holds here", "does not hold here", "cannot tell", "not run"
FAMILY = ("cbsa", "mssa", "tssa", "softmax")  # the attention types that are compared


@dataclass
class Finding:
    """
    Args:
        run: what was run, in one or more sentences.
        verdicts: part of the claim -> its verdict, and the reason.
        tables: tables in Markdown.
        picture: caption and picture.
    """

    run: str
    verdicts: dict[str, tuple[str, str]]
    tables: list[str] = field(default_factory=list)
    picture: tuple[str, Image.Image] | None = None


@dataclass
class Workbench:
    """The data and models that the claims are checked with. They are loaded or trained when they are first used."""

    cache: Path
    dataset_name: str | None = None
    masks_name: str | None = None
    checkpoints: Path | None = None
    recipe: Recipe = field(default_factory=Recipe)
    seeds: tuple[int, ...] = (0, 1, 2)
    num_images: int = 64

    @cached_property
    def splits(self):
        """The data set, read once."""
        return load_images(self.dataset_name)

    def thumbnails(self, split: str) -> Thumbnails:
        """All images of a split, in the image size of the small models."""
        dataset = find_split(self.splits, split)
        return make_thumbnails(dataset, *find_columns(dataset), self.recipe.image_size)

    @cached_property
    def training_set(self) -> Thumbnails:
        """The thumbnails of the `train` split."""
        return self.thumbnails("train")

    @cached_property
    def validation_set(self) -> Thumbnails:
        """The thumbnails of the `validation` split."""
        return self.thumbnails("validation")

    def photos(
        self, processor: BaseImageProcessor, count: int, split: str = "validation"
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """About evenly spaced images of a split with their labels, `count` in all, in batches of 16."""
        dataset = find_split(self.splits, split)
        image_column, label_column = find_columns(dataset)
        rows = dataset[range(0, len(dataset), max(1, len(dataset) // count))]
        images = [image.convert("RGB") for image in rows[image_column][:count]]
        pixel_values = processor(images, return_tensors="pt")["pixel_values"]
        return [*zip(pixel_values.split(16), torch.tensor(rows[label_column][:count]).split(16), strict=True)]

    def small(self, name: str, seed: int, **values) -> PreTrainedModel:
        """The small model with this name and seed. It is trained unless it is in the cache."""
        return small_model(self.training_set, self.recipe, seed, self.cache, name, **values)

    def adapted(self, model: PreTrainedModel, name: str, seed: int, **values) -> PreTrainedModel:
        """The model with other configuration values, fine-tuned. It is trained unless it is in the cache."""
        return fine_tuned(model, self.training_set, self.recipe, seed, self.cache, name, **values)

    def compared(self) -> dict[str, str]:
        """The folders of the comparison that exist, by attention type; seed 0."""
        if self.checkpoints is None:
            return {}
        folders = {name: self.checkpoints / f"{name}-0" for name in FAMILY}
        return {name: str(folder) for name, folder in folders.items() if folder.is_dir()}

    def describe_small(self) -> str:
        """The recipe of the small models as a sentence for the page."""
        recipe = self.recipe
        return (
            f"Small models: {recipe.num_layers} layers of width {recipe.hidden_size}, {recipe.num_heads} heads, ISTA, "
            f"{recipe.representatives_size} x {recipe.representatives_size} representatives, on images of "
            f"{recipe.image_size} px with patches of {recipe.patch_size} px; {len(self.training_set.labels)} training "
            f"images, {recipe.num_epochs} epochs; {len(self.seeds)} seeds; measured on "
            f"{len(self.validation_set.labels)} validation images."
        )


def table(header: list[str], rows: list[list]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def spread(values, digits: int = 3) -> str:
    """Mean ± standard deviation."""
    values = [float(value) for value in values]
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values) if len(values) > 1 else 0:.{digits}f}"


def sign_verdict(differences: list[float]) -> str:
    """The verdict over seeds: the claim holds if all differences are positive, and fails if all are negative."""
    if all(difference > 0 for difference in differences):
        return HOLDS
    return FAILS if all(difference < 0 for difference in differences) else OPEN


def not_run(reason: str, *parts: str) -> Finding:
    """The finding of a claim that was not checked, with the same reason for all its parts."""
    return Finding("", dict.fromkeys(parts, (NOT_RUN, reason)))

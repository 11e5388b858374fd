"""Small models, of which two cores can train many: images in memory, and one plain training loop."""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch.nn import functional as F

from cbsa_hf import CBSAConfig, CBSAForImageClassification
from cbsa_hf.attention_cbsa import LearnedRepresentatives


@dataclass(frozen=True)
class Recipe:
    """How every small model is built and trained: a smaller copy of the published CBT, on small images."""

    image_size: int = 32
    patch_size: int = 4
    hidden_size: int = 64
    num_layers: int = 4
    num_heads: int = 2
    representatives_size: int = 4
    num_epochs: int = 4
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.05

    def config(self, num_labels: int, **values) -> CBSAConfig:
        """The configuration of a small model; `values` are more of its fields."""
        return CBSAConfig(
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            representatives_size=self.representatives_size,
            image_size=self.image_size,
            patch_size=self.patch_size,
            num_labels=num_labels,
            **values,
        )


@dataclass
class Thumbnails:
    """
    Labelled images of one size, in memory.

    Args:
        pixel_values: (images, 3, size, size), from -1 to 1.
        labels: (images,), class indices.
        num_labels: number of classes.
        digest: SHA-256 of images and labels; the cache of trained models depends on it.
    """

    pixel_values: torch.Tensor
    labels: torch.Tensor
    num_labels: int
    digest: str

    def batches(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of 256 images (batch, 3, height, width) with their labels (batch,); the last one may be smaller."""
        return [*zip(self.pixel_values.split(256), self.labels.split(256), strict=True)]


def make_thumbnails(dataset: Dataset, image_column: str, label_column: str, size: int) -> Thumbnails:
    """Resize every image of a labelled data set to a square of `size` pixels."""
    pixels = np.stack(
        [np.asarray(row.convert("RGB").resize((size, size), Image.BILINEAR)) for row in dataset[image_column]]
    )
    pixel_values = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    labels = np.array(dataset[label_column])
    digest = hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()
    return Thumbnails(pixel_values, torch.from_numpy(labels), dataset.features[label_column].num_classes, digest)


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mirror each image or not, and shift all by one distance, up to an eighth of a side; borders are repeated."""
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    reach = images.shape[2] // 8
    row, column = torch.randint(2 * reach + 1, (2,), generator=generator).tolist()
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    return padded[:, :, row : row + images.shape[2], column : column + images.shape[3]]


def train(
    model: CBSAForImageClassification, data: Thumbnails, recipe: Recipe, num_epochs: int, seed: int
) -> CBSAForImageClassification:
    """
    Train with AdamW and a cosine schedule whose first tenth is warm-up. All random numbers depend on the seed alone.
    Returns the model in evaluation mode.
    """
    generator = torch.Generator().manual_seed(seed)
    steps_per_epoch = len(data.labels) // recipe.batch_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=num_epochs * steps_per_epoch, pct_start=0.1
    )
    model.train()
    for _ in range(num_epochs):
        order = torch.randperm(len(data.labels), generator=generator)
        for batch in order[: steps_per_epoch * recipe.batch_size].split(recipe.batch_size):
            logits = model(augment(data.pixel_values[batch], generator)).logits
            loss = F.cross_entropy(logits, data.labels[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.eval()


def accuracy(model: CBSAForImageClassification, data: Thumbnails) -> float:
    """Share of the images whose most probable class is their label."""
    with torch.no_grad():
        hits = [model(images).logits.argmax(-1) == labels for images, labels in data.batches()]
    return torch.cat(hits).double().mean().item()


def remember(folder: Path, key: dict, build) -> CBSAForImageClassification:
    """Load the model saved under this key. If there is none, build it and save it, under a temporary name first."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    final = folder / f"{key['name']}-{digest}"
    if not final.is_dir():
        partial = final.with_name(final.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        build().save_pretrained(partial)
        partial.rename(final)
    return CBSAForImageClassification.from_pretrained(final).eval()


def small_model(
    data: Thumbnails, recipe: Recipe, seed: int, folder: Path, name: str, learned_std: float = 1.0, **values
) -> CBSAForImageClassification:
    """
    A model with these configuration values, trained from scratch; or from the folder, if it was trained before.
    `learned_std` is the initial standard deviation of learned representatives.
    """

    def build() -> CBSAForImageClassification:
        torch.manual_seed(seed)
        model = CBSAForImageClassification(recipe.config(data.num_labels, **values))
        for module in model.modules():
            if isinstance(module, LearnedRepresentatives):
                torch.nn.init.normal_(module.weight, std=learned_std)
        return train(model, data, recipe, recipe.num_epochs, seed)

    key = {"name": f"{name}-{seed}", "recipe": asdict(recipe), "images": data.digest, "values": values}
    return remember(folder, key, build)


def fine_tuned(
    model: CBSAForImageClassification, data: Thumbnails, recipe: Recipe, seed: int, folder: Path, name: str, **values
) -> CBSAForImageClassification:
    """
    A trained model with other configuration values, fine-tuned for half as many epochs at a quarter of the learning
    rate; or from the folder, if it was fine-tuned before.
    """

    def build() -> CBSAForImageClassification:
        adapted = with_attention(model, **values)
        gentle = Recipe(**{**asdict(recipe), "learning_rate": recipe.learning_rate / 4})
        return train(adapted, data, gentle, max(1, recipe.num_epochs // 2), seed)

    key = {"name": f"{name}-{seed}", "recipe": asdict(recipe), "images": data.digest, "values": values}
    return remember(folder, key, build)


def with_attention(model: CBSAForImageClassification, **values) -> CBSAForImageClassification:
    """A model with other configuration values and the same weights."""
    changed = CBSAForImageClassification(CBSAConfig(**{**model.config.to_diff_dict(), "auto_map": None, **values}))
    changed.load_state_dict(model.state_dict())
    return changed.eval()

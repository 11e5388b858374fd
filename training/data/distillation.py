"""What a teacher says of whole images, kept on disk, and the training images that come with it."""

import json
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import BaseImageProcessor

from data.classification import Crop, TrainingImages
from data.labelled_images import LabelledImages, to_tensor
from tasks.teachers import Teacher


def describe_answers(teacher: Teacher, images: LabelledImages, size: int) -> dict[str, str | int]:
    """What decides the teacher's answers; see [`write_answers`]."""
    return {
        "teacher": teacher.name,
        "data set": images.fingerprint,
        "number of images": len(images),
        "image size": size,
        "patch size": teacher.patch_size,
    }


def check_answers(teacher: Teacher, images: LabelledImages, size: int, folder: Path):
    """A ValueError when the folder's answers are not those that [`write_answers`] would write; it says why."""
    try:
        found = json.loads((folder / "answers.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} does not say what its answers are of: choose another `--teacher_cache`, or remove it."
        ) from error
    wanted = describe_answers(teacher, images, size)
    others = [f"{name} {found.get(name)}, not {value}" for name, value in wanted.items() if found.get(name) != value]
    if others:
        raise ValueError(
            f"The answers in {folder} are of {'; '.join(others)}: choose another `--teacher_cache`, or remove it."
        )


def write_answers(teacher: Teacher, images: LabelledImages, processor: BaseImageProcessor, size: int, folder: Path):
    """
    What the teacher says of each whole image, as float16 in `logits.npy`, `map_0.npy`, ..., and what decides that in
    `answers.json`: all of it, or nothing. A broken image gets zeros.

    Args:
        teacher: for the student's patch size.
        images: the training images.
        processor: says how pixels are scaled and normalised.
        size: side in pixels that whole images are resized to before the student's crops would be cut.
        folder: where to write.
    """
    device = teacher.scale.device
    side = size // teacher.patch_size
    shapes = {"logits": (teacher.network.num_labels,)}
    for i, (width, ratio) in enumerate(zip(teacher.network.widths, teacher.network.ratios, strict=True)):
        shapes[f"map_{i}"] = (width, -(-side // ratio), -(-side // ratio))
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    files = {
        name: np.lib.format.open_memmap(partial / f"{name}.npy", "w+", np.float16, (len(images), *shape))
        for name, shape in shapes.items()
    }
    for start in tqdm(range(0, len(images), 32), desc="teacher", unit_scale=32, unit="img"):
        rows = range(start, min(start + 32, len(images)))
        found = {i: row[0] for i in rows if (row := images.read(i)) is not None}
        if found:
            resized = [to_tensor(image.resize((size, size)), processor) for image in found.values()]
            logits, maps = teacher(torch.stack(resized).to(device))
            for name, answer in zip(shapes, [logits, *maps], strict=True):
                files[name][list(found)] = answer.half().cpu().numpy()
    for file in files.values():
        file.flush()
    (partial / "answers.json").write_text(json.dumps(describe_answers(teacher, images, size), indent=2) + "\n")
    partial.rename(folder)


class TaughtImages(TrainingImages):
    """
    Training images with what a teacher said of each whole image, its maps cropped, flipped and mixed as the image is:
    much cheaper than a teacher that looks at every crop.

    Args:
        teacher: for the student's patch size.
        folder: of what [`write_answers`] wrote.
        **kwargs: see [`TrainingImages`].
    """

    def __init__(self, teacher: Teacher, folder: Path, **kwargs):
        super().__init__(**kwargs)
        self.patch_size = teacher.patch_size
        self.ratios = teacher.network.ratios
        self.logits = np.load(folder / "logits.npy", mmap_mode="r")
        self.maps = [np.load(folder / f"map_{i}.npy", mmap_mode="r") for i in range(len(self.ratios))]

    def tensors(self, crop: Crop, size: int) -> dict[str, torch.Tensor]:
        answers = {"teacher_logits": torch.from_numpy(self.logits[crop.index].astype(np.float32))}
        left, upper, right, lower = crop.box
        for i, (stored, ratio) in enumerate(zip(self.maps, self.ratios, strict=True)):
            side = -(-(size // self.patch_size) // ratio)
            centres = (torch.arange(side) + 0.5) / side
            columns = left + (right - left) * (centres.flip(0) if crop.flipped else centres)
            rows = upper + (lower - upper) * centres
            points = torch.stack(torch.meshgrid(2 * columns - 1, 2 * rows - 1, indexing="xy"), dim=-1)
            features = torch.from_numpy(stored[crop.index].astype(np.float32))
            sampled = F.grid_sample(features[None], points[None], padding_mode="border", align_corners=False)[0]
            answers[f"teacher_map_{i}"] = sampled
        return {**super().tensors(crop, size), **answers}

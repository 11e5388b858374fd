"""A teacher's outputs for whole images, kept on disk, and training images that come with them as targets."""

import json
import os
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import BaseImageProcessor

from training.data.classification import Crop, TrainingImages
from training.data.labelled_images import LabelledImages, to_tensor
from training.engine.output import check_free, remove
from training.tasks.teachers import Teacher


DESCRIPTION, DESCRIPTION_BEFORE = "targets.json", "answers.json"  # the second is what version 0.1 wrote
CHUNK = 32  # images that the teacher sees at once


def describe_targets(teacher: Teacher, images: LabelledImages, size: int) -> dict[str, str | int]:
    """Everything that the targets depend on; see [`write_targets`]."""
    return {
        "teacher": teacher.name,
        "data set": images.fingerprint,
        "number of images": len(images),
        "image size": size,
        "patch size": teacher.patch_size,
    }


def check_targets(teacher: Teacher, images: LabelledImages, size: int, folder: Path):
    """Raises ValueError if the targets in a folder differ from those that [`write_targets`] would write."""
    name = DESCRIPTION if (folder / DESCRIPTION).exists() else DESCRIPTION_BEFORE
    try:
        found = dict(json.loads((folder / name).read_text()))
    except (OSError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{folder} does not say what its targets are of: choose another `--teacher_cache`, or remove it."
        ) from error
    wanted = describe_targets(teacher, images, size)
    others = [f"{name} {found.get(name)}, not {value}" for name, value in wanted.items() if found.get(name) != value]
    if others:
        raise ValueError(
            f"The targets in {folder} are of {'; '.join(others)}: choose another `--teacher_cache`, or remove it."
        )


def target_shapes(teacher: Teacher, size: int) -> dict[str, tuple[int, ...]]:
    """Shape of each target of one image: `logits`, `map_0`, ...; `size` is the side of the image in pixels."""
    side = size // teacher.patch_size
    shapes = {"logits": (teacher.network.num_labels,)}
    for i, (width, ratio) in enumerate(zip(teacher.network.widths, teacher.network.ratios, strict=True)):
        shapes[f"map_{i}"] = (width, -(-side // ratio), -(-side // ratio))
    return shapes


def write_targets(teacher: Teacher, images: LabelledImages, processor: BaseImageProcessor, size: int, folder: Path):
    """
    Write the teacher's logits and feature maps of each whole image, as float16 in `logits.npy`, `map_0.npy`, ..., and
    what they depend on in `targets.json`: all files, or none. A broken image gets zeros.

    Args:
        teacher: made for the student's patch size.
        images: the training images.
        processor: says how pixels are scaled and normalised.
        size: side in pixels that whole images are resized to.
        folder: where to write.

    Raises:
        ValueError: if the disk has too little room.
        OSError: if the files cannot be written.
    """
    shapes = target_shapes(teacher, size)
    partial = folder.with_name(folder.name + ".partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        num_bytes = 2 * len(images) * sum(int(np.prod(shape)) for shape in shapes.values())
        check_free(partial, num_bytes, "the teacher's targets", "--teacher_cache")
        write_arrays(teacher, images, processor, size, {partial / f"{name}.npy": s for name, s in shapes.items()})
        (partial / DESCRIPTION).write_text(json.dumps(describe_targets(teacher, images, size), indent=2) + "\n")
        partial.rename(folder)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error
    finally:
        if partial.exists():
            remove(partial)


def write_arrays(
    teacher: Teacher,
    images: LabelledImages,
    processor: BaseImageProcessor,
    size: int,
    shapes: dict[Path, tuple[int, ...]],
):
    """
    See [`write_targets`]. Files are written from front to back: a file mapped into memory would end the process with a
    bus error on a full disk.

    Args:
        shapes: of each image's target by file: first of the logits, then of the maps.
    """
    files = [path.open("wb") for path in shapes]
    try:
        for file, shape in zip(files, shapes.values(), strict=True):
            header = {"descr": "<f2", "fortran_order": False, "shape": (len(images), *shape)}
            np.lib.format.write_array_header_1_0(file, header)
        for start in tqdm(range(0, len(images), CHUNK), desc="teacher", unit_scale=CHUNK, unit="img"):
            rows = range(start, min(start + CHUNK, len(images)))
            found = {i - start: row[0] for i in rows if (row := images.read(i)) is not None}
            targets = [np.zeros((len(rows), *shape), dtype="<f2") for shape in shapes.values()]
            if found:
                resized = [to_tensor(image.resize((size, size)), processor) for image in found.values()]
                logits, maps = teacher(torch.stack(resized).to(teacher.scale.device))
                for target, output in zip(targets, [logits, *maps], strict=True):
                    target[list(found)] = output.half().cpu().numpy()
            for file, target in zip(files, targets, strict=True):
                file.write(target.tobytes())
        for file in files:
            file.flush()
            os.fsync(file.fileno())
    finally:
        for file in files:
            file.close()


def prepare_targets(
    teacher: Teacher, images: TrainingImages, size: int, folder: str, accelerator: Accelerator
) -> Path:
    """
    The folder of the teacher's targets. The main process writes them first if there are none.

    Args:
        teacher, images, size: see [`write_targets`].
        folder: the option `--teacher_cache`.
        accelerator: of the run.

    Raises:
        ValueError: if the folder holds other targets, or they do not fit on the disk.
    """
    targets = Path(folder)
    with accelerator.main_process_first():
        if not targets.exists():
            write_targets(teacher, images, images.processor, size, targets)
    check_targets(teacher, images, size, targets)
    return targets


class DistillationDataset(TrainingImages):
    """
    Training images with the teacher's targets of each whole image. The target maps are cropped, flipped and mixed like
    the image. That is much cheaper than a teacher that sees every crop.

    Args:
        teacher: made for the student's patch size.
        folder: written by [`write_targets`].
        **kwargs: see [`TrainingImages`].
    """

    def __init__(self, teacher: Teacher, folder: Path, **kwargs):
        super().__init__(**kwargs)
        self.patch_size = teacher.patch_size
        self.ratios = teacher.network.ratios
        self.logits = np.load(folder / "logits.npy", mmap_mode="r")
        self.maps = [np.load(folder / f"map_{i}.npy", mmap_mode="r") for i in range(len(self.ratios))]

    def tensors(self, crop: Crop, size: int) -> dict[str, torch.Tensor]:
        """`pixel_values`, `teacher_logits` (num_labels,) and `teacher_map_0`, ..., (channels, rows, columns)."""
        targets = {"teacher_logits": torch.from_numpy(self.logits[crop.index].astype(np.float32))}
        left, upper, right, lower = crop.box
        for i, (stored, ratio) in enumerate(zip(self.maps, self.ratios, strict=True)):
            side = -(-(size // self.patch_size) // ratio)
            centres = (torch.arange(side) + 0.5) / side
            columns = left + (right - left) * (centres.flip(0) if crop.flipped else centres)
            rows = upper + (lower - upper) * centres
            points = torch.stack(torch.meshgrid(2 * columns - 1, 2 * rows - 1, indexing="xy"), dim=-1)
            features = torch.from_numpy(stored[crop.index].astype(np.float32))
            sampled = F.grid_sample(features[None], points[None], padding_mode="border", align_corners=False)[0]
            targets[f"teacher_map_{i}"] = sampled
        return {**super().tensors(crop, size), **targets}

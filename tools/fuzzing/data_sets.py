"""Cases of data sets with labels or with masks, and of the scripts that train or score on them."""

import io
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
from datasets import ClassLabel, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from cbsa_hf.segmentation.images import open_mask

from . import ROOT, SCRATCH
from .cases import Case, Folders, Random
from .checkpoints import change_text
from .drawing import (
    COMMON,
    MODES,
    OTHERS,
    add_metadata,
    damage,
    draw_picture,
    encode,
    orientation_block,
    pick,
    random_bytes,
)
from .images import NAMES, TURNS
from .models import CLASSES


SCRIPTS = ("pretrain.py", "finetune.py", "adapt.py", "score.py")
TRAINING = ["--num_epochs=1", "--num_workers=0", "--warmup_epochs=0", "--report_to=none"]
MODELS = SCRATCH / "models"
MOST_CORRUPT = (0, 1, 3, 10, 1000)  # values of `--max_corrupt`


def encode_png(image: Image.Image) -> dict:
    """An image as `datasets` stores it."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def draw_mask(random: Random, size: tuple[int, int]) -> Image.Image:
    """A mask with the three classes as stripes; some pixels are 255, which is no class."""
    labels = np.arange(size[1]) * 3 // size[1]
    labels = np.broadcast_to(labels[:, None], (size[1], size[0])).astype(np.uint8)
    return Image.fromarray(np.where(random.random(labels.shape) < 0.02, 255, labels).astype(np.uint8))


def make_rows(random: Random, masks: bool, count: int) -> list[dict]:
    """Rows of an image and a class, or of an image and a mask."""
    rows = []
    for index in range(count):
        picture = draw_picture(random, least=16, most=40)
        label = encode_png(draw_mask(random, picture.size)) if masks else index % len(CLASSES)
        rows.append({"image": encode_png(picture), "label": label})
    return rows


def break_image(random: Random) -> dict | None:
    """A value in the column of images that cannot be read as an image."""
    data, _ = encode(random, draw_picture(random), pick(random, COMMON))
    broken = (b"", b"x", data[: len(data) // 3], data[:20], random_bytes(random, 99), b"%!PS-Adobe-3.0 EPSF-3.0\n")
    links = ({"bytes": None, "path": "missing.png"}, {"bytes": None, "path": None}, {"bytes": b"", "path": None})
    return pick(random, (None, *links, *({"bytes": data, "path": None} for data in broken)))


def odd_image(random: Random) -> dict:
    """An image of any mode and format, sound or damaged."""
    data, format = encode(random, draw_picture(random, pick(random, MODES)), pick(random, COMMON + OTHERS))
    data = pick(random, (data, add_metadata(random, data, format), damage(random, data)))
    return {"bytes": data, "path": pick(random, (None, "photo.png", "x/y"))}


def odd_mask(random: Random, row: dict) -> dict | None:
    """A mask that does not fit its image or the classes."""
    with Image.open(io.BytesIO(row["label"]["bytes"])) as mask:
        labels = np.array(mask)
    values = [labels * 0, labels * 0 + 255, (labels > 0) * np.uint8(255), labels + 3, labels * 100, labels[:-1]]
    values += [labels.astype(np.uint16), labels.astype(np.uint16) * 300, labels == 1, np.stack([labels] * 3, -1)]
    values += [labels.astype(np.int32) - 1, labels.astype(np.float32), np.stack([labels] * 2, -1), labels.T]
    try:
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pick(random, values))).save(file, pick(random, ("PNG", "TIFF")))
        return {"bytes": file.getvalue(), "path": None}
    except OSError:  # PNG does not store floats
        return break_image(random)


def damage_rows(random: Random, rows: list[dict], masks: bool) -> str | None:
    """Damage some of the rows, in place. Returns `sentence` if no run can succeed."""
    kind = random.random()
    share = pick(random, (1, 1, 2, len(rows)))
    chosen = [rows[int(index)] for index in random.choice(len(rows), min(share, len(rows)), replace=False)]
    for row in chosen:
        if kind < 0.25:
            row["image"] = break_image(random)
        elif kind < 0.45:
            row["image"] = odd_image(random)
        elif not masks:
            row["label"] = pick(random, (-1, 3, None, -100, 255, -(2**31), 2**40, len(CLASSES)))
        elif kind < 0.55:
            row["label"] = break_image(random)
        else:
            row["label"] = odd_mask(random, row)
    return "sentence" if (kind < 0.25 and len(chosen) == len(rows)) or (kind >= 0.45 and not masks) else None


def write_rows(random: Random, path: Path, rows: list[dict], masks: bool, odd_columns: bool):
    """Write a Parquet file, with the usual columns, or with columns of other types and names."""
    label = ImageFeature() if masks else ClassLabel(names=CLASSES)
    features, names = Features({"image": ImageFeature(), "label": label}), ["image", "label"]
    if odd_columns:
        others = (
            Value("int64"),
            Value("string"),
            Value("float32"),
            ClassLabel(names=["a"]),
            ClassLabel(names=CLASSES),
        )
        if random.random() < 0.5 and not masks:
            features["label"] = pick(random, (*others, datasets.List(Value("int64"))))
        else:
            features["image"] = pick(random, (Value("binary"), Value("string"), ImageFeature(mode="L")))
        names = pick(random, (names, ["x", "label"], ["image", "y"], ["label", "image"]))
    columns = {}
    for name, (key, feature) in zip(names, features.items(), strict=True):
        values = [row[key] for row in rows]
        values = [value["bytes"] if value else None for value in values] if feature == Value("binary") else values
        if feature == Value("string"):
            values = [str(value)[:9] for value in values]
        if isinstance(feature, datasets.List):
            values = [[value] for value in values]
        columns[name] = (feature, values)
    schema = Features({name: feature for name, (feature, _) in columns.items()}).arrow_schema
    if odd_columns and random.random() < 0.1:
        schema = schema.remove_metadata()
    table = pyarrow.table(
        [pyarrow.array(v, type=f.type) for (_, v), f in zip(columns.values(), schema, strict=True)], schema
    )
    pyarrow.parquet.write_table(table, path)


def write_dataset(random: Random, folder: Path, masks: bool) -> str | None:
    """Write two splits, most often with one of them damaged. Returns the expected end, or None if both are right."""
    damaged, expected = pick(random, ("train", "validation")), None
    kind = random.random()
    for split, count in (("train", 6), ("validation", 3)):
        rows = make_rows(random, masks, count)
        path = folder / f"{split}-00000-of-00001.parquet"
        if split == damaged and kind < 0.7:
            expected = damage_rows(random, rows, masks)
        elif split == damaged and kind < 0.75:
            rows = rows[: int(random.integers(2))]
            expected = "sentence" if split == "train" and not rows else None  # a batch may be one image
        elif split == damaged and kind < 0.78:
            expected = "sentence"
            continue
        write_rows(random, path, rows, masks, odd_columns=split == damaged and 0.78 <= kind < 0.88)
        if split == damaged and 0.88 <= kind < 0.93:
            path.write_bytes(damage(random, path.read_bytes()))
    names = folder / "id2label.json"
    if masks:
        names.write_text(json.dumps(dict(enumerate(CLASSES))))
        if 0.93 <= kind < 0.98:
            change_text(random, names)
    return "result" if kind >= 0.98 else expected


def run_script(name: str, *arguments: str) -> Callable[[], object]:
    """A function that runs a training script in this process as `python SCRIPT` would."""

    def run():
        sys.argv = [name, *arguments]
        runpy.run_path(str(ROOT / "training" / name), run_name="__main__")

    return run


def import_scripts():
    """Import the training scripts and what they need, once for all forked processes."""
    for script in SCRIPTS:
        runpy.run_path(str(ROOT / "training" / script))


def training_options(random: Random, folders: Folders) -> list[str]:
    """Options of a training run on the data set of a case."""
    options = [f"--dataset_name={folders.inputs}", f"--max_corrupt={pick(random, MOST_CORRUPT)}"]
    options += [f"--output_dir={folders.output / 'run'}", *TRAINING, f"--batch_size={pick(random, (1, 2, 3))}"]
    if random.random() < 0.2:
        options += ["--streaming=true", *pick(random, ([], ["--num_train_images=6"]))]
    return options


def score(random: Random, folders: Folders, task: str, checkpoint: str, *options: str) -> Case:
    """A case that scores on the validation split. Any end may be right, since the damage may be in the other split."""
    options += (f"--dataset_name={folders.inputs}", f"--max_corrupt={pick(random, MOST_CORRUPT)}")
    options += (f"--checkpoint={MODELS / checkpoint}", f"--output={folders.output / 'scores.json'}")
    return Case(run_script("score.py", f"--task={task}", *options))


def make_labels(random: Random, folders: Folders) -> Case:
    """A data set with labels, sound or not, and a script that trains or scores on it."""
    expected = write_dataset(random, folders.inputs, masks=False)
    if random.random() < 0.25:
        return score(random, folders, "image-classification", "classifier", "--batch_size=2")
    options = training_options(random, folders)
    if random.random() < 0.3:
        options += ["--mixup_alpha=0.2"]
        expected = "sentence" if "--streaming=true" in options else expected
    lines = {
        "pretrain.py": [f"--config_name={MODELS / 'classifier'}", "--patch_embedding_type=patchify"],
        "finetune.py": ["--task=image-classification", f"--model_name_or_path={MODELS / 'classifier'}"],
        "adapt.py": [f"--model_name_or_path={MODELS / 'vit'}", f"--attention_type={pick(random, ('agent', 'cbsa'))}"],
    }
    if random.random() < 0.5:
        lines["adapt.py"] += ["--hidden_states_weight=1"]
    script = pick(random, list(lines))
    return Case(run_script(script, *options, *lines[script]), expected)


def make_masks(random: Random, folders: Folders) -> Case:
    """A mask or a data set with masks, sound or not, and a function that reads it, trains on it or scores on it."""
    if random.random() < 0.3:
        return make_mask_file(random, folders)
    expected = write_dataset(random, folders.inputs, masks=True)
    if random.random() < 0.3:
        if random.random() < 0.4:
            return score(random, folders, "zero-shot-segmentation", "classifier", "--image_size=32")
        return score(random, folders, "semantic-segmentation", "segmenter")
    options = training_options(random, folders)
    options += ["--task=semantic-segmentation", f"--model_name_or_path={MODELS / 'classifier'}", "--crop_size=32"]
    options += pick(
        random, [[], ["--class_balanced=true"], ["--dice=true"], ["--reduce_labels=true"], ["--image_size=24"]]
    )
    if "--reduce_labels=true" in options:
        expected = None
    elif {"--class_balanced=true", "--streaming=true"} <= {*options}:
        expected = "sentence"
    return Case(run_script("finetune.py", *options), expected)


def make_mask_file(random: Random, folders: Folders) -> Case:
    """A mask in a file of any mode and format. A sound one is read with its own values, turned upright."""
    path = folders.inputs / pick(random, NAMES)
    picture = draw_picture(random, pick(random, ("1", "L", "P", "RGB", "I", "I;16")))
    orientation = int(random.integers(1, 9))
    options = {"exif": orientation_block(orientation)} if random.random() < 0.4 else {}
    data, format = encode(random, picture, pick(random, COMMON), **options)
    if random.random() < 0.5:
        path.write_bytes(damage(random, data))
        return Case(lambda: open_mask(path), None, (path.name,))
    with Image.open(io.BytesIO(data)) as stored:
        values, turn = np.asarray(stored), stored.getexif().get(0x0112, 1)
    written = add_metadata(random, data, format) if random.random() < 0.6 else data
    path.write_bytes(written)
    expected = [TURNS[number](values) for number in (TURNS if written != data else [turn])]

    def check(found: Image.Image) -> str | None:
        same = any(np.array_equal(wanted, np.asarray(found)) for wanted in expected)
        return None if same else "other labels than those in the file"

    return Case(lambda: open_mask(path), "result", (path.name,), check)

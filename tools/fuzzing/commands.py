"""Cases of command lines: of `cbsa`, and of the training scripts."""

import dataclasses
import json
import shutil
from itertools import pairwise
from pathlib import Path

from cbsa_hf import cli

from .cases import Case, Folders, Random
from .data_sets import MODELS, TRAINING, make_rows, run_script, write_rows
from .drawing import draw_picture, pick
from .models import CLASSES


ODD_WORDS = ("0", "-1", "1", "2", "7", "0.5", "nan", "inf", "30000", "1000000000", "9" * 30, "x", "", "-", "é\n")
WRITERS = ("output_dir", "output", "strip", "teacher_cache")  # options that say where to write
ENDLESS = "num_epochs"  # never changed: a run with a billion epochs is no fault


def make_paths(random: Random, folders: Folders) -> dict[str, Path]:
    """Files for the arguments of a command, by name. Those in the output folder are places where it may write."""
    names = ("photo.png", "other.png", "text.txt", "empty", "folder", "missing", "classifier", "segmenter", "encoder")
    files = {name: folders.inputs / name for name in names}
    for name in ("classifier", "segmenter", "encoder"):
        shutil.copytree(MODELS / name, files[name])
    files["folder"].mkdir()
    files["text.txt"].write_text("no picture\n")
    files["empty"].touch()
    outputs = ("existing.png", "new.png", "NEW.PNG", "new.jpg", "new", "no/new.png", "full", "new_mask.png")
    files |= {name: folders.output / name for name in outputs}
    for path in (files["photo.png"], files["other.png"], files["folder"] / "inner.png", files["existing.png"]):
        draw_picture(random).save(path)
    files["full"].mkdir()
    (files["full"] / "file").touch()
    return files


def sound_line(random: Random, files: dict[str, Path]) -> list[str]:
    """A valid command line of `cbsa`. Without a network, `push` ends with a sentence."""
    command = pick(random, ("segment", "segment", "segment", "attention", "inspect", "convert", "push"))
    if command == "push":
        return [command, "you/model", "--checkpoint", str(files["classifier"]), *pick(random, ([], ["--private"]))]
    output = files["new" if command in ("inspect", "convert") else "new.png"]
    if command == "convert":
        options = (["--origin", "vit"], ["--attention", "agent"], ["--num-heads", "2"], ["--license", "mit"], [])
        return [command, str(files["classifier"]), "-o", str(output), *pick(random, options)]
    checkpoint = pick(random, ("classifier", "encoder", "segmenter"))
    options = [["--long-side", "64"], []]
    if command == "inspect":
        options += [["--patch", "1", "2"]]
    if command == "segment":
        options += [["--segments", "3"], ["--method", "attention"], ["--sharp"], ["--mask", str(files["NEW.PNG"])]]
        if random.random() < 0.4:
            checkpoint, options = "segmenter", [["--task=semantic"], ["--task=semantic", "--long-side", "64"]]
    photos = [str(files["photo.png"])]
    if command == "segment" and random.random() < 0.3:
        pattern = str(files["photo.png"].with_name("*.png"))
        photos = pick(random, ([*photos, str(files["other.png"])], [str(files["folder"])], [pattern]))
        output = files["new"]
    line = [command, *photos, "-o", str(output), "--checkpoint", str(files[checkpoint])]
    return line + pick(random, options) + (pick(random, options) if random.random() < 0.3 else [])


def change_line(random: Random, line: list[str], files: dict[str, Path]) -> list[str]:
    """The command line with one word replaced or removed, or with more words."""
    kind, at = random.random(), int(random.integers(len(line)))
    if kind < 0.6:
        values = [str(path) for path in files.values()]
        at = pick(random, range(1, len(line))) if random.random() < 0.9 else at
        return [*line[:at], pick(random, (*values, *values, *ODD_WORDS)), *line[at + 1 :]]
    if kind < 0.7:
        return line[:at] + line[at + 1 :]
    flags = ["--sharp", "--force", "--force", "--private", "--unknown"]
    numbers = ["--long-side", "--segments", "--num-heads", "--patch", "--max-pixels", "--max-memory"]
    others = {"--task": "semantic", "--method": "mass", "--mask": str(files["existing.png"]), "--origin": "cbt"}
    others |= {"--attention": "agent", "--verify": str(files["text.txt"]), "--checkpoint": str(files["missing"])}
    return line + pick(
        random,
        [
            *([flag] for flag in flags),
            *([number, pick(random, ODD_WORDS)] for number in numbers),
            *([name, pick(random, (value, *ODD_WORDS))] for name, value in others.items()),
            [str(files[pick(random, ("other.png", "missing", "folder"))])],
            ["-o", str(files["existing.png"])],
        ],
    )


def make_command(random: Random, folders: Folders) -> Case:
    """A command line of `cbsa`, or of a training script."""
    if random.random() < 0.25:
        return make_script_command(random, folders)
    files = make_paths(random, folders)
    line = sound_line(random, files)
    for _ in range(int(random.integers(3))):
        line = change_line(random, line, files)
    for at, (option, value) in enumerate(pairwise(line)):
        if option in ("-o", "--mask") and Path(value).is_relative_to(folders.inputs) and line.count(value) == 1:
            line[at + 1] = str(files["new"])  # writing where the user asks for it would look like a fault
    replaced = (files["existing.png"],) if "--force" in line else ()
    return Case(lambda: cli.main(line), is_command=True, replaced=replaced)


def write_sound_dataset(random: Random, folder: Path, masks: bool):
    """Write two small splits with labels or with masks."""
    for split, count in (("train", 6), ("validation", 3)):
        rows = make_rows(random, masks, count)
        write_rows(random, folder / f"{split}-00000-of-00001.parquet", rows, masks, odd_columns=False)
    (folder / "id2label.json").write_text(json.dumps(dict(enumerate(CLASSES))))


def make_script_command(random: Random, folders: Folders) -> Case:
    """A command line of a training script, with some odd values."""
    from training.arguments import (
        AdaptationArguments,
        FinetuningArguments,
        PretrainingArguments,
        ScoringArguments,
        SegmentationArguments,
    )

    masks = random.random() < 0.3
    write_sound_dataset(random, folders.inputs, masks)
    task = "semantic-segmentation" if masks else "image-classification"
    data, batch = f"--dataset_name={folders.inputs}", "--batch_size=2"
    training = [data, batch, f"--output_dir={folders.output / 'run'}", *TRAINING]
    scoring = [data, f"--checkpoint={MODELS / ('segmenter' if masks else 'classifier')}", *([] if masks else [batch])]
    lines = {
        "pretrain.py": (PretrainingArguments, [*training, f"--config_name={MODELS / 'classifier'}"]),
        "finetune.py": (
            SegmentationArguments if masks else FinetuningArguments,
            [*training, f"--model_name_or_path={MODELS / 'classifier'}", f"--task={task}"],
        ),
        "adapt.py": (AdaptationArguments, [*training, f"--model_name_or_path={MODELS / 'vit'}"]),
        "score.py": (ScoringArguments, [*scoring, f"--task={task}"]),
    }
    script = pick(random, ("finetune.py", "score.py") if masks else list(lines))
    arguments, line = lines[script]
    names = [known.name for known in dataclasses.fields(arguments) if known.name not in (*WRITERS, ENDLESS)]
    values = (*ODD_WORDS, "true", "\0", "[1]", str(folders.inputs / "missing"))
    line += [f"--{pick(random, names)}={pick(random, values)}" for _ in range(int(random.integers(3)))]
    return Case(run_script(script, *line), is_command=True)

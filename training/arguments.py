"""Arguments of a training script: a YAML recipe, overridden by the command line."""

import difflib
import sys
from argparse import ArgumentParser
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TypeVar

import yaml
from transformers import HfArgumentParser

from cbsa_hf.mask_decoder_cbsa import DECODERS


T = TypeVar("T")

OPTIMIZERS = ("adamw", "lion", "muon", "sgd")

SCHEDULES = ("cosine", "polynomial")

LEAST = {
    "batch_size": 1,
    "checkpointing_steps": 1,
    "crop_sizes": 1,
    "gradient_accumulation_steps": 1,
    "image_size": 1,
    "keep_checkpoints": 1,
    "num_epochs": 1,
    "num_train_images": 1,
    "num_workers": 0,
    "picture_epochs": 1,
    "validation_epochs": 1,
}

NEEDED = {"num_train_images": "streaming", "teacher_cache": "teacher"}  # by the option that does nothing without it


@dataclass(kw_only=True)
class DataArguments:
    """Options of every script that reads labelled images."""

    dataset_name: str = field(metadata={"help": "hub id, local folder or Parquet file"})
    dataset_config_name: str | None = field(default=None, metadata={"help": "configuration, where there are several"})
    image_column: str | None = field(default=None, metadata={"help": "column of the images; default: by its type"})
    label_column: str | None = field(
        default=None, metadata={"help": "column of the classes or masks; default: by its type, masks by their name"}
    )
    max_corrupt: int = field(default=10, metadata={"help": "unreadable images that are skipped before the run stops"})


@dataclass(kw_only=True)
class TrainingArguments(DataArguments):
    """Options of every training script."""

    train_split: str = field(default="train", metadata={"help": "split to train on"})
    validation_split: str = field(default="validation", metadata={"help": "split to validate on"})
    output_dir: str = field(metadata={"help": "where checkpoints, logs and the trained model go"})
    streaming: bool = field(
        default=False,
        metadata={
            "help": "whether training images are read as they come, by every process, each shuffled among 1000; those "
            "of validation are read into memory, still encoded"
        },
    )
    num_train_images: int | None = field(
        default=None, metadata={"help": "images per epoch when streaming; default: as the data set says"}
    )
    num_epochs: int = field(default=30, metadata={"help": "passes over the training split"})
    batch_size: int = field(default=64, metadata={"help": "images per step, over all processes together"})
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "parts that a batch is computed in, one after the other, to save memory"}
    )
    optimizer: str = field(default="adamw", metadata={"help": "which optimiser", "choices": OPTIMIZERS})
    learning_rate: float = field(default=1e-3, metadata={"help": "peak learning rate, for the whole batch"})
    layer_decay: float = field(
        default=1.0, metadata={"help": "factor on the learning rate from each layer to the one before it"}
    )
    weight_decay: float = field(default=0.05, metadata={"help": "decay of weight matrices; nothing else decays"})
    schedule: str = field(default="cosine", metadata={"help": "after the warm-up", "choices": SCHEDULES})
    warmup_epochs: float = field(default=2.0, metadata={"help": "epochs of linear warm-up"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "largest norm of the gradient"})
    ema_decay: float | None = field(
        default=None, metadata={"help": "decay per step of an average of the weights, which is then what is validated"}
    )
    drop_path_rate: float | None = field(
        default=None, metadata={"help": "share of a batch that skips the last layer's blocks (stochastic depth)"}
    )
    num_workers: int = field(default=1, metadata={"help": "processes that load images, per training process"})
    seed: int = field(default=0, metadata={"help": "seed of weights, order and augmentation"})
    validation_epochs: int = field(
        default=1, metadata={"help": "epochs from one validation, and the checkpoint after it, to the next"}
    )
    checkpointing_steps: int | None = field(
        default=None, metadata={"help": "steps from one checkpoint to the next, besides those after validations"}
    )
    keep_checkpoints: int = field(default=2, metadata={"help": "how many of the newest stay, beside the best"})
    keep_best: bool = field(
        default=False, metadata={"help": "whether the best weights of all validations are the result, not the last"}
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "a checkpoint folder, or `last` for the newest in output_dir"}
    )
    report_to: str = field(default="tensorboard", metadata={"help": "Accelerate's tracker, or `none`"})
    picture_epochs: int | None = field(
        default=None, metadata={"help": "epochs from one picture of validation images in the log to the next"}
    )
    push_to_hub: str | None = field(default=None, metadata={"help": "id to publish the result under, `user/model`"})


@dataclass(kw_only=True)
class ClassificationArguments(TrainingArguments):
    """Options of every script that trains a classifier."""

    crop_sizes: list[int] | None = field(
        default=None,
        metadata={"help": "sides of the training crops, one for each equal part of the run; default: image_size"},
    )
    random_crop_sizes: bool = field(
        default=False, metadata={"help": "whether every batch draws its side from crop_sizes, all through the run"}
    )
    min_crop_scale: float = field(default=0.25, metadata={"help": "smallest share of an image's area in a crop"})
    mixup_alpha: float = field(default=0.0, metadata={"help": "parameter of blends of two images; 0 for none"})
    cutmix_alpha: float = field(
        default=0.0, metadata={"help": "parameter of rectangles pasted from another image; 0 for none"}
    )
    label_smoothing: float = field(default=0.1, metadata={"help": "probability spread evenly over all classes"})
    teacher: str | None = field(
        default=None, metadata={"help": "efficientnet-lite0, 1 or 2, or an image classifier by folder or hub id"}
    )
    teacher_cache: str | None = field(
        default=None,
        metadata={"help": "folder for what the teacher says of whole images, once; default: it looks at every crop"},
    )
    logits_weight: float = field(default=1.0, metadata={"help": "weight of the teacher's class probabilities"})
    maps_weight: float = field(default=3.0, metadata={"help": "weight of the teacher's feature maps"})


@dataclass(kw_only=True)
class SegmentationArguments(TrainingArguments):
    """Options of `finetune.py --task semantic-segmentation`."""

    task: str = field(metadata={"help": "what the model is to do"})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "encoder or segmenter, folder or hub id; default: the shipped classifier"}
    )
    id2label: str | None = field(
        default=None, metadata={"help": "JSON file with the names of the classes; default: id2label.json in the data"}
    )
    reduce_labels: bool = field(
        default=False, metadata={"help": "whether label 0 does not count and the others move down by one (ADE20K)"}
    )
    decoder_type: str | None = field(
        default=None, metadata={"help": f"{', '.join(DECODERS)}; default: as the model says"}
    )
    crop_size: list[int] = field(
        default_factory=lambda: [512], metadata={"help": "height and width of the training crops in pixels, or a side"}
    )
    image_size: int | None = field(
        default=None,
        metadata={"help": "long side that images have in training and validation, in pixels; default: as they come"},
    )
    min_resize_ratio: float = field(default=0.5, metadata={"help": "least factor beyond that in training"})
    max_resize_ratio: float = field(default=2.0, metadata={"help": "largest factor beyond that in training"})
    photometric_distortion: bool = field(default=True, metadata={"help": "whether colours are distorted at random"})
    class_balanced: bool = field(default=False, metadata={"help": "whether rare classes weigh more"})
    dice: bool = field(
        default=False, metadata={"help": "whether the overlap of masks, class by class, joins the loss of the pixels"}
    )
    window: list[int] | None = field(
        default=None, metadata={"help": "height and width of the windows of validation; default: crop_size"}
    )


def check_names(names: list[str], known: list[str], source: str):
    """A ValueError for the first name that is not known; it says one that is and looks like it."""
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean `{nearest[0]}`?" if nearest else "`--help` lists those that it knows."
            raise ValueError(f"{source} names `{name}`, which the script does not know; {hint}")


def check_values(args: object):
    """A ValueError for an option below its [`LEAST`] value, or without the one that it is [`NEEDED`] with."""
    for name, least in LEAST.items():
        value = getattr(args, name, None)
        smallest = min(value) if isinstance(value, list) else value
        if smallest is not None and smallest < least:
            raise ValueError(f"`--{name}` is {smallest}, and has to be at least {least}.")
    for name, needed in NEEDED.items():
        if getattr(args, name, None) is not None and not getattr(args, needed):
            raise ValueError(f"`--{name}` does nothing without `--{needed}`.")


def read_recipe(path: str) -> dict:
    """
    The values of a recipe.

    Raises:
        ValueError: no such file, or not a mapping in YAML.
    """
    try:
        recipe = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"The recipe {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"The recipe {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"The recipe {path} has to be a list of `name: value` lines.")
    return {str(name): value for name, value in recipe.items()}


def find_value(name: str, choices: Iterable[str]) -> str:
    """
    The value of one option that decides which others there are, from the process's command line or its recipe.

    Raises:
        ValueError: it is not given, or none of the choices.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument(f"--{name}")
    given = parser.parse_known_args()[0]
    value = getattr(given, name)
    if value is None and given.config is not None:
        value = read_recipe(given.config).get(name)
    if value not in choices:
        given = "not given" if value is None else value
        raise ValueError(f"`--{name}` is {given}; choose one of {', '.join(choices)}.")
    return value


def parse_arguments(arguments_class: type[T], argv: list[str] | None = None) -> T:
    """
    Parse `--config RECIPE` and whatever else the command line says, which wins.

    Args:
        arguments_class: a dataclass whose fields are the script's options.
        argv: the command line; that of the process when None.

    Raises:
        ValueError: a recipe or an option that cannot be understood, or is out of bounds.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = HfArgumentParser(arguments_class, allow_abbrev=False)
    parser.add_argument("--config", help="YAML file with values for the options above; the command line overrides it")
    known = [option[2:].replace("-", "_") for action in parser._actions for option in action.option_strings]
    given = [argument[2:].split("=")[0].replace("-", "_") for argument in argv if argument.startswith("--")]
    check_names(given, known, "The command line")
    config = ArgumentParser(add_help=False, allow_abbrev=False)
    config.add_argument("--config")
    path = config.parse_known_args(argv)[0].config
    if path is not None:
        recipe = read_recipe(path)
        check_names(list(recipe), [f.name for f in fields(arguments_class) if f.init], f"The recipe {path}")
        from_recipe = []
        for name, value in recipe.items():
            if value is not None:
                from_recipe += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
        argv = [*from_recipe, *argv]
    args = parser.parse_args_into_dataclasses(argv)[0]
    check_values(args)
    return args

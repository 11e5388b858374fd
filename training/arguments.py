"""
The options of all training scripts, and how they are read: from a YAML recipe and from the command line.

Each dataclass with an `_argument_group_name` is one group of options in `--help`. A script's options are a class that
inherits from several groups. Rules about an option's value stand in its annotation: `Annotated[int, AtLeast(1)]`.
"""

import difflib
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, TypeVar, get_type_hints

import yaml
from transformers import HfArgumentParser

from cbsa_hf import PRESETS
from cbsa_hf.mask_decoder_cbsa import DECODERS


T = TypeVar("T")

OPTIMIZERS = ("adamw", "lion", "muon", "sgd")
SCHEDULES = ("cosine", "polynomial")
ADAPTED_TYPES = ("agent", "mita", "cbsa")  # of attention, that `adapt.py` can put in place of softmax attention
SCORED_TASKS = ("image-classification", "semantic-segmentation", "zero-shot-segmentation")
# What `compare.py` trains, as options of `pretrain.py`: the white-box operators with ISTA, the others with an MLP.
FAMILY = {
    "cbsa": {"attention_type": ["cbsa"], "feed_forward_type": "ista"},
    "mssa": {"attention_type": ["mssa"], "feed_forward_type": "ista"},
    "tssa": {"attention_type": ["tssa"], "feed_forward_type": "ista"},
    "softmax": {"attention_type": ["softmax"], "feed_forward_type": "mlp"},
    "mita": {"attention_type": ["mita"], "feed_forward_type": "mlp"},
}
SHARED = {f"cbsa-{n}-unique": {**FAMILY["cbsa"], "num_unique_layers": n} for n in (6, 4, 2, 1)}
MEMBERS = FAMILY | SHARED
MIN_FOREGROUND = 0.02  # share of an image that is foreground, for zero-shot segmentation to score it


@dataclass(frozen=True)
class AtLeast:
    """The smallest value that an option may have; of a list, that each of its values may have."""

    least: float

    def check(self, name: str, args: object, given: set[str]):
        """Raises ValueError if the value is smaller, or no number."""
        value = getattr(args, name)
        smallest = min(value) if isinstance(value, list) else value
        if smallest is not None and not smallest >= self.least:
            raise ValueError(f"`--{name}` is {smallest}, and has to be at least {self.least}.")


@dataclass(frozen=True)
class AtMost:
    """The largest value that an option may have."""

    most: float

    def check(self, name: str, args: object, given: set[str]):
        """Raises ValueError if the value is larger."""
        value = getattr(args, name)
        if value is not None and value > self.most:
            raise ValueError(f"`--{name}` is {value}, and has to be at most {self.most}.")


@dataclass(frozen=True)
class Below:
    """A number that the value of an option does not reach."""

    limit: float

    def check(self, name: str, args: object, given: set[str]):
        """Raises ValueError if the value reaches it."""
        value = getattr(args, name)
        if value is not None and value >= self.limit:
            raise ValueError(f"`--{name}` is {value}, and has to be below {self.limit}.")


@dataclass(frozen=True)
class Needs:
    """Another option, without which this one does nothing."""

    needed: str

    def check(self, name: str, args: object, given: set[str]):
        """Raises ValueError if the option is set and the other is not."""
        if getattr(args, name) is not None and not getattr(args, self.needed):
            raise ValueError(f"`--{name}` does nothing without `--{self.needed}`.")


@dataclass(frozen=True)
class OnlyFor:
    """The values of `--task` with which an option has an effect. With others, giving it is an error."""

    tasks: tuple[str, ...]

    def check(self, name: str, args: object, given: set[str]):
        """Raises ValueError if the option is given and `--task` is none of the tasks."""
        if name in given and args.task not in self.tasks:
            raise ValueError(
                f"`--{name}` has no effect with `--task {args.task}`, only with {' or '.join(self.tasks)}."
            )


@dataclass(kw_only=True)
class TaskArguments:
    """What the model is trained for."""

    _argument_group_name = "task"

    task: str = field(metadata={"help": "what the model is to do"})


@dataclass(kw_only=True)
class ArchitectureArguments:
    """The configuration of a new model."""

    _argument_group_name = "model"

    config_name: str = field(
        default="cbt-tiny", metadata={"help": f"one of {', '.join(PRESETS)}; or a configuration by hub id or path"}
    )
    num_register_tokens: int | None = field(
        default=None, metadata={"help": "learned tokens beside CLS; default: as configured"}
    )
    patch_embedding_type: str | None = field(default=None, metadata={"help": "stem; default: as configured"})
    image_size: Annotated[int | None, AtLeast(1)] = field(
        default=None, metadata={"help": "side in pixels that model and processor are for; default: as configured"}
    )
    patch_size: int | None = field(
        default=None, metadata={"help": "side of a patch in pixels; default: as configured"}
    )


@dataclass(kw_only=True)
class OperatorArguments:
    """The operators of a new model's layers."""

    _argument_group_name = "layers of the model"

    attention_type: list[str] | None = field(
        default=None, metadata={"help": "operator, or one for each stored layer; default: as configured"}
    )
    feed_forward_type: str | None = field(default=None, metadata={"help": "feed-forward; default: as configured"})
    num_unique_layers: int | None = field(
        default=None, metadata={"help": "layers with weights of their own; default: as configured"}
    )
    layer_sharing: str | None = field(
        default=None, metadata={"help": "which layers share weights, `cyclic` or `repeated`; default: as configured"}
    )


@dataclass(kw_only=True)
class ClassifierArguments:
    """The classifier to fine-tune."""

    _argument_group_name = "model"

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "classifier, folder or hub id; default: the shipped one"}
    )


@dataclass(kw_only=True)
class SegmenterArguments:
    """The model to fine-tune for semantic segmentation."""

    _argument_group_name = "model"

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "encoder or segmenter, folder or hub id; default: the shipped classifier"}
    )
    decoder_type: str | None = field(
        default=None, metadata={"help": f"{', '.join(DECODERS)}; default: as the model says"}
    )
    decoder_skip: bool | None = field(
        default=None,
        metadata={"help": "read the maps of the stem too, for detail finer than a patch; default: as the model says"},
    )


@dataclass(kw_only=True)
class OriginalArguments:
    """The ViT to adapt, and the attention it gets."""

    _argument_group_name = "model"

    model_name_or_path: str = field(metadata={"help": "ViT, DeiT or DINOv2, by hub id or folder"})
    attention_type: str = field(
        default="agent", metadata={"help": "what replaces its attention", "choices": ADAPTED_TYPES}
    )
    hidden_states_weight: Annotated[float, AtLeast(0)] = field(
        default=0.0,
        metadata={"help": "weight of the distance to the original's tokens after each layer; 0 for none"},
    )


@dataclass(kw_only=True)
class DataArguments:
    """The data set and its columns."""

    _argument_group_name = "data"

    dataset_name: str = field(metadata={"help": "hub id, local folder or Parquet file"})
    dataset_config_name: str | None = field(default=None, metadata={"help": "configuration, where there are several"})
    dataset_revision: str | None = field(
        default=None, metadata={"help": "branch, tag or commit on the Hub, such as refs/convert/parquet"}
    )
    image_column: str | None = field(default=None, metadata={"help": "column of the images; default: by its type"})
    label_column: str | None = field(
        default=None, metadata={"help": "column of the classes or masks; default: by its type and name"}
    )
    id2label: str | None = field(
        default=None,
        metadata={
            "help": "JSON file with the names of the classes by number; default: as the column says, or id2label.json "
            "in the folder of the data"
        },
    )
    max_corrupt: int = field(default=10, metadata={"help": "unreadable images that are skipped before the run stops"})


@dataclass(kw_only=True)
class SplitArguments:
    """The splits of the data set, and how they are read."""

    _argument_group_name = "splits of the data"

    train_split: str = field(default="train", metadata={"help": "split to train on, or a part: train[:80%%]"})
    validation_split: str = field(default="validation", metadata={"help": "split to validate on, or a part of one"})
    train_val_split: float | None = field(
        default=None,
        metadata={"help": "share of the training split to validate on, drawn at random, instead of validation_split"},
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "read training images while training, in every process, shuffled among 1000; validation images "
            "are read into memory, still encoded"
        },
    )
    num_train_images: Annotated[int | None, AtLeast(1), Needs("streaming")] = field(
        default=None, metadata={"help": "images per epoch when streaming; default: as the data set says"}
    )
    num_workers: Annotated[int, AtLeast(0)] = field(
        default=1, metadata={"help": "processes that load images, per training process"}
    )


@dataclass(kw_only=True)
class OptimizationArguments:
    """Batches, the optimiser and its schedule, regularisation."""

    _argument_group_name = "optimisation"

    num_epochs: Annotated[int, AtLeast(1)] = field(default=30, metadata={"help": "passes over the training split"})
    batch_size: Annotated[int, AtLeast(1)] = field(
        default=64, metadata={"help": "images per step, over all processes together"}
    )
    gradient_accumulation_steps: Annotated[int, AtLeast(1)] = field(
        default=1, metadata={"help": "parts that a batch is computed in, one after the other, to save memory"}
    )
    optimizer: str = field(default="adamw", metadata={"help": "which optimiser", "choices": OPTIMIZERS})
    learning_rate: Annotated[float, AtLeast(0)] = field(
        default=1e-3, metadata={"help": "peak learning rate, for the whole batch"}
    )
    layer_decay: Annotated[float, AtLeast(0)] = field(
        default=1.0, metadata={"help": "factor on the learning rate from each layer to the one before it"}
    )
    weight_decay: Annotated[float, AtLeast(0)] = field(
        default=0.05, metadata={"help": "decay of weight matrices; nothing else decays"}
    )
    schedule: str = field(default="cosine", metadata={"help": "after the warm-up", "choices": SCHEDULES})
    warmup_epochs: Annotated[float, AtLeast(0)] = field(default=2.0, metadata={"help": "epochs of linear warm-up"})
    max_grad_norm: Annotated[float, AtLeast(0)] = field(default=1.0, metadata={"help": "largest norm of the gradient"})
    ema_decay: Annotated[float | None, AtLeast(0), Below(1)] = field(
        default=None,
        metadata={"help": "decay per step of a moving average of the weights, which is then validated and saved"},
    )
    drop_path_rate: Annotated[float | None, AtLeast(0), Below(1)] = field(
        default=None, metadata={"help": "share of a batch that skips the last layer's blocks (stochastic depth)"}
    )


@dataclass(kw_only=True)
class OutputArguments:
    """What is written, when, and where."""

    _argument_group_name = "checkpoints, logs and results"

    output_dir: str = field(metadata={"help": "where checkpoints, logs and the trained model go"})
    validation_epochs: Annotated[int, AtLeast(1)] = field(
        default=1, metadata={"help": "epochs from one validation, and the checkpoint before it, to the next"}
    )
    checkpointing_steps: Annotated[int | None, AtLeast(1)] = field(
        default=None, metadata={"help": "steps from one checkpoint to the next, besides those at validations"}
    )
    keep_checkpoints: Annotated[int, AtLeast(1)] = field(
        default=2, metadata={"help": "how many of the newest stay, beside the best"}
    )
    keep_best: bool = field(
        default=False, metadata={"help": "save the best weights of all validations as the result, not the last"}
    )
    report_to: str = field(default="tensorboard", metadata={"help": "Accelerate's tracker, or `none`"})
    picture_epochs: Annotated[int | None, AtLeast(1)] = field(
        default=None, metadata={"help": "epochs from one picture of validation images in the log to the next"}
    )


@dataclass(kw_only=True)
class SessionArguments:
    """What differs between runs with the same settings."""

    _argument_group_name = "this run"

    seed: int = field(default=0, metadata={"help": "seed of weights, order and augmentation"})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "a checkpoint folder, or `last` for the newest in output_dir"}
    )
    push_to_hub: str | None = field(default=None, metadata={"help": "id to publish the result under, `user/model`"})


@dataclass(kw_only=True)
class RunArguments(DataArguments, SplitArguments, OptimizationArguments, OutputArguments, SessionArguments):
    """Options of every script that trains one model."""


@dataclass(kw_only=True)
class CropArguments:
    """Augmentation and loss of image classification."""

    _argument_group_name = "augmentation and loss"

    crop_sizes: Annotated[list[int] | None, AtLeast(1)] = field(
        default=None,
        metadata={"help": "sides of the training crops, one for each equal part of the run; default: image_size"},
    )
    random_crop_sizes: bool = field(
        default=False, metadata={"help": "draw the side of every batch from crop_sizes, all through the run"}
    )
    min_crop_scale: Annotated[float, AtLeast(0), AtMost(1)] = field(
        default=0.25, metadata={"help": "smallest share of an image's area in a crop"}
    )
    mixup_alpha: Annotated[float, AtLeast(0)] = field(
        default=0.0, metadata={"help": "parameter of blends of two images; 0 for none"}
    )
    cutmix_alpha: Annotated[float, AtLeast(0)] = field(
        default=0.0, metadata={"help": "parameter of rectangles pasted from another image; 0 for none"}
    )
    label_smoothing: Annotated[float, AtLeast(0), AtMost(1)] = field(
        default=0.1, metadata={"help": "probability spread evenly over all classes"}
    )


@dataclass(kw_only=True)
class TeacherArguments:
    """Distillation from a teacher."""

    _argument_group_name = "teacher"

    teacher: str | None = field(
        default=None, metadata={"help": "efficientnet-lite0, 1 or 2, or an image classifier by folder or hub id"}
    )
    teacher_cache: Annotated[str | None, Needs("teacher")] = field(
        default=None,
        metadata={
            "help": "folder for the teacher's outputs for whole images, computed once; default: it sees every crop"
        },
    )
    logits_weight: Annotated[float, AtLeast(0)] = field(
        default=1.0, metadata={"help": "weight of the teacher's class probabilities"}
    )
    maps_weight: Annotated[float, AtLeast(0)] = field(
        default=3.0, metadata={"help": "weight of the teacher's feature maps"}
    )


@dataclass(kw_only=True)
class ClassificationArguments(RunArguments, CropArguments, TeacherArguments):
    """Options of every script that trains one classifier."""


@dataclass(kw_only=True)
class PretrainingArguments(ArchitectureArguments, OperatorArguments, ClassificationArguments):
    """Options of `pretrain.py`."""


@dataclass(kw_only=True)
class FinetuningArguments(TaskArguments, ClassifierArguments, ClassificationArguments):
    """Options of `finetune.py --task image-classification`."""


@dataclass(kw_only=True)
class AdaptationArguments(OriginalArguments, ClassificationArguments):
    """Options of `adapt.py`."""


@dataclass(kw_only=True)
class MaskArguments:
    """Classes, augmentation, loss and validation of semantic segmentation."""

    _argument_group_name = "masks, augmentation and loss"

    reduce_labels: bool = field(
        default=False, metadata={"help": "ignore label 0 and move the others down by one (ADE20K)"}
    )
    crop_size: list[int] = field(
        default_factory=lambda: [512], metadata={"help": "height and width of the training crops in pixels, or a side"}
    )
    image_size: Annotated[int | None, AtLeast(1)] = field(
        default=None,
        metadata={"help": "long side that images have in training and validation, in pixels; default: their own"},
    )
    min_resize_ratio: Annotated[float, AtLeast(0)] = field(
        default=0.5, metadata={"help": "smallest further factor on it in training"}
    )
    max_resize_ratio: Annotated[float, AtLeast(0)] = field(
        default=2.0, metadata={"help": "largest further factor on it in training"}
    )
    photometric_distortion: bool = field(default=True, metadata={"help": "distort colours at random"})
    class_balanced: bool = field(default=False, metadata={"help": "give rare classes a larger weight"})
    dice: bool = field(default=False, metadata={"help": "add the soft Dice loss, which weighs all classes the same"})
    window: list[int] | None = field(
        default=None, metadata={"help": "height and width of the windows of validation; default: crop_size"}
    )


@dataclass(kw_only=True)
class SegmentationArguments(TaskArguments, SegmenterArguments, MaskArguments, RunArguments):
    """Options of `finetune.py --task semantic-segmentation`."""


@dataclass(kw_only=True)
class ComparedArguments:
    """Seeds and zero-shot scores of a comparison."""

    _argument_group_name = "comparison"

    members: list[str] = field(
        default_factory=lambda: [*FAMILY],
        metadata={"help": "what to train; default: the family, whose layers share no weights", "choices": [*MEMBERS]},
    )
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "seeds to train each member with"})
    masks_name: str | None = field(
        default=None, metadata={"help": "images with masks, to score zero-shot segmentation on; default: not scored"}
    )
    masks_split: str = field(default="train", metadata={"help": "split of these"})


@dataclass(kw_only=True)
class ComparisonArguments(
    ComparedArguments,
    ArchitectureArguments,
    DataArguments,
    SplitArguments,
    OptimizationArguments,
    OutputArguments,
    CropArguments,
    TeacherArguments,
):
    """Options of `compare.py`: those of `pretrain.py` but for the operators and for what belongs to one run."""


@dataclass(kw_only=True)
class ScoredArguments:
    """The checkpoint and the images to score."""

    _argument_group_name = "what to score"

    task: str = field(default=SCORED_TASKS[0], metadata={"help": "what to score", "choices": SCORED_TASKS})
    checkpoint: str | None = field(default=None, metadata={"help": "folder or hub id; default: the shipped one"})
    random_weights: bool = field(
        default=False, metadata={"help": "score the checkpoint's configuration with random weights, seed 0"}
    )
    split: str = field(default="validation", metadata={"help": "split to score on, or a part of one"})
    batch_size: Annotated[int, AtLeast(1), OnlyFor(SCORED_TASKS[:1])] = field(
        default=64, metadata={"help": "images per batch, over all processes together"}
    )
    image_size: Annotated[int | None, AtLeast(1)] = field(
        default=None, metadata={"help": "side, or long side for masks, in pixels; default: as the checkpoint says"}
    )


@dataclass(kw_only=True)
class ScoredMaskArguments:
    """How segmentations are made and scored."""

    _argument_group_name = "semantic and zero-shot segmentation"

    reduce_labels: Annotated[bool, OnlyFor(SCORED_TASKS[1:2])] = field(
        default=False, metadata={"help": "ignore label 0 and move the others down by one (ADE20K)"}
    )
    stride: Annotated[list[int] | None, OnlyFor(SCORED_TASKS[1:2])] = field(
        default=None,
        metadata={
            "help": "pixels down and across from one window of semantic segmentation to the next; default: two thirds"
        },
    )
    scales: Annotated[list[float], OnlyFor(SCORED_TASKS[1:2])] = field(
        default_factory=lambda: [1.0],
        metadata={"help": "factors on the image's size; semantic segmentation averages over them"},
    )
    flip: Annotated[bool, OnlyFor(SCORED_TASKS[1:2])] = field(
        default=False, metadata={"help": "average semantic segmentation over each image and its mirror image"}
    )
    min_foreground: Annotated[float, AtLeast(0), AtMost(1), OnlyFor(SCORED_TASKS[2:])] = field(
        default=MIN_FOREGROUND, metadata={"help": "least share of an image that is foreground, to score it"}
    )
    sharp: Annotated[bool, OnlyFor(SCORED_TASKS[1:])] = field(
        default=False, metadata={"help": "move the borders of masks to the edges in the image"}
    )


@dataclass(kw_only=True)
class ReportArguments:
    """Files that the scores are written to."""

    _argument_group_name = "output"

    strip: Annotated[str | None, OnlyFor(SCORED_TASKS[1:2])] = field(
        default=None, metadata={"help": "PNG to draw four predictions of semantic segmentation and their mistakes in"}
    )
    output: str | None = field(default=None, metadata={"help": "JSON file to write the numbers to"})
    force: bool = field(default=False, metadata={"help": "replace what `--strip` and `--output` name if it exists"})


@dataclass(kw_only=True)
class ScoringArguments(ScoredArguments, DataArguments, ScoredMaskArguments, ReportArguments):
    """Options of `score.py`."""


def check_names(names: list[str], known: list[str], source: str):
    """Raises ValueError for the first name that is not known, with the known name that is most like it."""
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean `{nearest[0]}`?" if nearest else "`--help` lists those that it knows."
            raise ValueError(f"{source} names `{name}`, which the script does not know; {hint}")


def check_values(args: object, given: set[str]):
    """
    Raises ValueError if an option breaks a rule of its annotation.

    Args:
        args: the options.
        given: names of those that the command line or the recipe sets.
    """
    for name, hint in get_type_hints(type(args), include_extras=True).items():
        for rule in getattr(hint, "__metadata__", ()):
            rule.check(name, args, given)


def read_recipe(path: str) -> dict:
    """
    The values of a recipe.

    Raises:
        ValueError: if there is no such file, or it is not a mapping in YAML.
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


def recipe_as_options(recipe: dict) -> list[str]:
    """The command line that says the same as a recipe."""
    options = []
    for name, value in recipe.items():
        if value is not None:
            options += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return options


def peek(argv: list[str] | None, *names: str) -> object:
    """The values of some options on a command line, each None where it is absent; all other options are ignored."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(f"--{name}")
    return parser.parse_known_args(argv)[0]


def find_value(name: str, choices: Iterable[str], description: str) -> str:
    """
    The value of an option that decides which other options there are, from the command line or its recipe. With
    `--help` and without a value, it prints the choices and ends the script.

    Args:
        name: of the option.
        choices: its values.
        description: of the script, for `--help`.

    Raises:
        ValueError: if it is not given, or is none of the choices.
    """
    given = peek(None, "config", name)
    value = getattr(given, name)
    if value is None and given.config is not None:
        value = read_recipe(given.config).get(name)
    if value is None and not {"-h", "--help"}.isdisjoint(sys.argv[1:]):
        parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
        parser.add_argument(f"--{name}", choices=choices, required=True, help="with it, --help shows all options")
        parser.add_argument("--config", help="YAML file with values for options, which may name it instead")
        parser.parse_args(["--help"])
    if value not in choices:
        given = "not given" if value is None else value
        raise ValueError(f"`--{name}` is {given}; choose one of {', '.join(choices)}.")
    return value


def parse_arguments(arguments_class: type[T], argv: list[str] | None = None) -> T:
    """
    Read the options from `--config RECIPE` and from the command line. The command line overrides the recipe.

    Args:
        arguments_class: a dataclass that inherits all its fields from groups of options.
        argv: the command line; by default, that of the process.

    Raises:
        ValueError: if the recipe or an option is not known, or a value breaks a rule.
    """
    argv = sys.argv[1:] if argv is None else argv
    groups = [parent for parent in arguments_class.__mro__ if "_argument_group_name" in vars(parent)]
    parser = HfArgumentParser(groups, allow_abbrev=False)
    parser.add_argument("--config", help="YAML file with values for options; the command line overrides it")
    # argparse has no public list of a parser's options.
    destinations = {option[2:]: action.dest for action in parser._actions for option in action.option_strings}
    given = [argument[2:].split("=")[0] for argument in argv if argument.startswith("--")]
    check_names(given, list(destinations), "The command line")
    names = {destinations[option] for option in given}
    path = peek(argv, "config").config
    if path is not None:
        recipe = read_recipe(path)
        check_names(list(recipe), [option.name for option in fields(arguments_class)], f"The recipe {path}")
        names.update(recipe)
        argv = [*recipe_as_options(recipe), *argv]
    parsed = parser.parse_args_into_dataclasses(argv)
    values = {name: value for group in parsed for name, value in vars(group).items()}
    args = arguments_class(**{option.name: values[option.name] for option in fields(arguments_class)})
    check_values(args, names)
    return args

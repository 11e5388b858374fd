"""
Train a CBSA image classifier from scratch, with or without a teacher.

    accelerate launch training/pretrain.py --dataset_name ../shared/data/imagenette-128 --output_dir runs/imagenette

`--dataset_name` takes a hub id, a local folder or a Parquet file; `--config` takes a recipe. `--help` shows all
options.
"""

from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    ViTImageProcessorPil,
)
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from cbsa_hf import PRESETS, preset_path
from cbsa_hf.checkpoints.weight_files import CheckpointError, one_sentence
from cbsa_hf.configuration_cbsa import to_pair
from training.arguments import PretrainingArguments, parse_arguments
from training.data.loading import class_names, problem_type, select_labelled
from training.engine.interruption import exit_with_a_sentence
from training.engine.loop import TrainingRun
from training.engine.setup import check_room, empty_model, load_splits, start_run
from training.tasks.classification import ClassificationTask


CHANGES = (
    "num_unique_layers",
    "layer_sharing",
    "num_register_tokens",
    "feed_forward_type",
    "patch_embedding_type",
    "image_size",
    "patch_size",
)


def build_config(
    args: PretrainingArguments, names: list[str] | None = None, problem_type: str | None = None
) -> PreTrainedConfig:
    """
    The configuration that the options describe.

    Args:
        args: the script's options.
        names: of the classes; as configured by default.
        problem_type: see [`problem_type`].

    Raises:
        ValueError: if there is no such configuration, or a value does not fit.
    """
    changes = {name: getattr(args, name) for name in (*CHANGES, "drop_path_rate")} | {"problem_type": problem_type}
    if args.attention_type is not None:
        changes["attention_type"] = args.attention_type if len(args.attention_type) > 1 else args.attention_type[0]
    if names is not None:
        changes |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    with one_sentence("This is no configuration of a model"):
        try:
            config = AutoConfig.from_pretrained(
                preset_path(args.config_name) if args.config_name in PRESETS else args.config_name,
                trust_remote_code=False,
                **{name: value for name, value in changes.items() if value is not None},
            )
        except OSError as error:
            raise CheckpointError(
                f"`--config_name {args.config_name}` is neither one of {', '.join(PRESETS)}, nor a configuration that "
                "can be reached by that path or hub id."
            ) from error
        config.validate()  # also the values that were changed after the file was read
    return config


def build_model(args: PretrainingArguments, dataset: Dataset) -> tuple[PreTrainedModel, ViTImageProcessorPil]:
    """A model with random weights that the options describe, for the classes of the data; and its image processor."""
    config = build_config(args, class_names(dataset), problem_type(dataset))
    model = AutoModelForImageClassification.from_config(config, trust_remote_code=False)
    height, width = to_pair(config.image_size)
    mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    if config.num_channels != 3:
        mean = std = [0.5] * config.num_channels
    processor = ViTImageProcessorPil(
        size={"height": height, "width": width},
        image_mean=mean,
        image_std=std,
        do_convert_rgb=config.num_channels == 3,
    )
    return model, processor


def main(args: PretrainingArguments):
    """Train a classifier from scratch."""
    with start_run(args) as accelerator:
        check_room(args, accelerator, empty_model(AutoModelForImageClassification, build_config(args)))
        splits = load_splits(args, select_labelled)
        model, processor = build_model(args, splits[0])
        task = ClassificationTask(args, accelerator, model, processor, splits)
        TrainingRun(args, accelerator, task).run()


if __name__ == "__main__":
    with exit_with_a_sentence():
        main(parse_arguments(PretrainingArguments))

"""
Train a CBSA image classifier from scratch, with or without a teacher.

    accelerate launch training/pretrain.py --dataset_name ../shared/data/imagenette-128 --output_dir runs/imagenette

`--dataset_name` takes a hub id, a local folder or a Parquet file; `--config` a recipe. See `--help` for the rest.
"""

from dataclasses import dataclass, field

from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    ViTImageProcessorPil,
)
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from arguments import ClassificationArguments, parse_arguments
from cbsa_hf import PRESETS, preset_path
from cbsa_hf.checkpoints.weight_files import CheckpointError, one_sentence
from cbsa_hf.modeling_cbsa import to_pair
from data.loading import class_names, find_columns
from engine.interruption import exit_with_a_sentence
from engine.loop import load_splits, start_run
from tasks.classification import train_classifier


@dataclass(kw_only=True)
class Arguments(ClassificationArguments):
    config_name: str = field(
        default="cbt-tiny", metadata={"help": f"one of {', '.join(PRESETS)}; or a configuration by hub id or path"}
    )
    attention_type: list[str] | None = field(
        default=None, metadata={"help": "operator, or one for each layer; default: as configured"}
    )
    num_register_tokens: int | None = field(
        default=None, metadata={"help": "learned tokens beside CLS; default: as configured"}
    )
    feed_forward_type: str | None = field(default=None, metadata={"help": "feed-forward; default: as configured"})
    patch_embedding_type: str | None = field(default=None, metadata={"help": "stem; default: as configured"})
    image_size: int | None = field(
        default=None, metadata={"help": "side in pixels that model and processor are for; default: as configured"}
    )
    patch_size: int | None = field(
        default=None, metadata={"help": "side of a patch in pixels; default: as configured"}
    )


def build_config(args: Arguments, names: list[str]) -> PreTrainedConfig:
    """The configuration that the arguments describe, for those class names; a ValueError when there is none."""
    fields = ("num_register_tokens", "feed_forward_type", "patch_embedding_type", "image_size", "patch_size")
    changes = {name: getattr(args, name) for name in (*fields, "drop_path_rate")}
    if args.attention_type is not None:
        changes["attention_type"] = args.attention_type if len(args.attention_type) > 1 else args.attention_type[0]
    with one_sentence("This is no configuration of a model"):
        try:
            config = AutoConfig.from_pretrained(
                preset_path(args.config_name) if args.config_name in PRESETS else args.config_name,
                id2label=dict(enumerate(names)),
                label2id={name: i for i, name in enumerate(names)},
                trust_remote_code=False,
                **{name: value for name, value in changes.items() if value is not None},
            )
        except OSError as error:
            raise CheckpointError(
                f"`--config_name {args.config_name}` is neither one of {', '.join(PRESETS)}, nor a configuration that "
                "can be reached by that path or hub id."
            ) from error
        config.validate()  # what was changed after it was read, too
    return config


def build_model(args: Arguments, names: list[str]) -> tuple[PreTrainedModel, ViTImageProcessorPil]:
    """A model that the arguments describe, for those class names, its weights random; and its image processor."""
    config = build_config(args, names)
    model = AutoModelForImageClassification.from_config(config, trust_remote_code=False)
    height, width = to_pair(config.image_size)
    processor = ViTImageProcessorPil(
        size={"height": height, "width": width},
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
        do_convert_rgb=True,
    )
    return model, processor


def main(args: Arguments):
    with start_run(args) as accelerator:
        splits = load_splits(args, find_columns)
        train_classifier(args, accelerator, *build_model(args, class_names(splits[0])), splits)


if __name__ == "__main__":
    with exit_with_a_sentence():
        main(parse_arguments(Arguments))

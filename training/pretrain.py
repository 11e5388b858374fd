"""
Train a CBSA image classifier from scratch, with or without a teacher.

    accelerate launch training/pretrain.py --dataset_name ../shared/data/imagenette-128 --output_dir runs/imagenette

`--dataset_name` takes a hub id, a local folder or a Parquet file; `--config` a recipe. See `--help` for the rest.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from arguments import parse_arguments
from classification import Classification, draw_attention
from data import TrainingImages, ValidationImages, find_columns, find_split, load_images
from distillation import TaughtImages, Teacher, build_teaching, prepare_teacher, write_answers
from evaluation import evaluate_classifier
from huggingface_hub.errors import StrictDataclassError
from loop import TrainingArguments, build_accelerator, build_loader, train
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, ViTImageProcessorPil
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from cbsa_hf import PRESETS, preset_path
from cbsa_hf.modeling_cbsa import to_pair


@dataclass(kw_only=True)
class Arguments(TrainingArguments):
    dataset_name: str = field(metadata={"help": "hub id, local folder or Parquet file"})
    dataset_config_name: str | None = field(default=None, metadata={"help": "configuration, where there are several"})
    train_split: str = field(default="train", metadata={"help": "split to train on"})
    validation_split: str = field(default="validation", metadata={"help": "split to validate on"})
    config_name: str = field(
        default="cbt-tiny", metadata={"help": f"one of {', '.join(PRESETS)}; or a configuration by hub id or path"}
    )
    attention_type: str | None = field(default=None, metadata={"help": "operator; default: as configured"})
    feed_forward_type: str | None = field(default=None, metadata={"help": "feed-forward; default: as configured"})
    patch_embedding_type: str | None = field(default=None, metadata={"help": "stem; default: as configured"})
    image_size: int | None = field(
        default=None, metadata={"help": "side in pixels that model and processor are for; default: as configured"}
    )
    patch_size: int | None = field(
        default=None, metadata={"help": "side of a patch in pixels; default: as configured"}
    )
    crop_sizes: list[int] | None = field(
        default=None,
        metadata={"help": "sides of the training crops, one for each equal part of the run; default: image_size"},
    )
    min_crop_scale: float = field(default=0.25, metadata={"help": "smallest share of an image's area in a crop"})
    mixup_alpha: float = field(default=0.0, metadata={"help": "parameter of the mixtures of two images; 0 for none"})
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


def build_config(args: Arguments, names: list[str]) -> PreTrainedConfig:
    """The configuration that the arguments describe, for those class names; a ValueError when there is none."""
    fields = ("attention_type", "feed_forward_type", "patch_embedding_type", "image_size", "patch_size")
    changes = {name: getattr(args, name) for name in (*fields, "drop_path_rate")}
    try:
        config = AutoConfig.from_pretrained(
            preset_path(args.config_name) if args.config_name in PRESETS else args.config_name,
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
            **{name: value for name, value in changes.items() if value is not None},
        )
        config.validate()  # what was changed after it was read, too
    except OSError as error:
        raise ValueError(
            f"`--config_name {args.config_name}` is neither one of {', '.join(PRESETS)}, nor a configuration that can "
            "be reached by that path or hub id."
        ) from error
    except StrictDataclassError as error:
        raise ValueError(f"This is no configuration of a model: {error.__cause__ or error}") from error
    return config


def main(args: Arguments):
    accelerator = build_accelerator(args)
    splits = load_images(args.dataset_name, args.dataset_config_name)
    train_split, validation_split = (find_split(splits, s) for s in (args.train_split, args.validation_split))
    _, label_column = find_columns(train_split)
    config = build_config(args, train_split.features[label_column].names)
    model = AutoModelForImageClassification.from_config(config)
    height, width = to_pair(config.image_size)
    processor = ViTImageProcessorPil(
        size={"height": height, "width": width},
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
        do_convert_rgb=True,
    )
    augmentation = {
        "dataset": train_split,
        "max_corrupt": args.max_corrupt,
        "processor": processor,
        "crop_sizes": args.crop_sizes or [height],
        "num_epochs": args.num_epochs,
        "min_crop_scale": args.min_crop_scale,
        "mixup_alpha": args.mixup_alpha,
        "seed": args.seed,
    }
    train_images, teacher, teach = TrainingImages(**augmentation), None, None
    if args.teacher is not None:
        teacher = Teacher(args.teacher, processor.image_mean, processor.image_std, config.patch_size)
        teacher = prepare_teacher(teacher, accelerator)
        if args.teacher_cache is None:
            teach = build_teaching(teacher, accelerator)
        else:
            answers = Path(args.teacher_cache)
            with accelerator.main_process_first():
                if not answers.exists():
                    write_answers(teacher, train_images, processor, height, answers)
            train_images = TaughtImages(teacher, answers, **augmentation)
    validation_images = ValidationImages(validation_split, args.max_corrupt, processor)
    validation_loader = accelerator.prepare(build_loader(validation_images, args, train=False))
    train(
        args,
        accelerator,
        Classification(model, args.label_smoothing, teacher, args.logits_weight, args.maps_weight),
        processor,
        train_images,
        validate=lambda network: evaluate_classifier(
            lambda pixel_values: network(pixel_values)["logits"], validation_loader, accelerator
        ),
        metric="accuracy",
        teach=teach,
        draw=lambda model: draw_attention(model, validation_images),
    )


if __name__ == "__main__":
    try:
        main(parse_arguments(Arguments))
    except ValueError as error:
        sys.exit(f"pretrain.py: {error}")

"""
Fine-tune a model on images with labels or with masks.

    accelerate launch training/finetune.py --task semantic-segmentation --dataset_name ../shared/data/camvid \
        --output_dir runs/camvid
    accelerate launch training/finetune.py --task image-classification --dataset_name you/own --output_dir runs/own

`--dataset_name` takes a hub id, a local folder or a Parquet file; `--config` a recipe. `--task TASK --help` shows the
rest.
"""

from dataclasses import dataclass, field

from transformers import AutoModelForImageClassification

from arguments import ClassificationArguments, SegmentationArguments, find_value, parse_arguments
from cbsa_hf import default_checkpoint
from cbsa_hf.checkpoints import load_processor
from data.loading import class_names, find_columns
from engine.interruption import exit_with_a_sentence
from engine.loop import load_splits, start_run
from tasks.classification import train_classifier
from tasks.heads import load_for_classes
from tasks.segmentation import train_segmenter


@dataclass(kw_only=True)
class FinetuningArguments(ClassificationArguments):
    task: str = field(metadata={"help": "what the model is to do"})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "classifier, folder or hub id; default: the shipped one"}
    )


def finetune_classifier(args: FinetuningArguments):
    """Fine-tune a classifier, its head made anew where the classes differ."""
    with start_run(args) as accelerator:
        splits = load_splits(args, find_columns)
        names = dict(enumerate(class_names(splits[0])))
        source = args.model_name_or_path or default_checkpoint()
        changes = {} if args.drop_path_rate is None else {"drop_path_rate": args.drop_path_rate}
        model = load_for_classes(AutoModelForImageClassification, source, names, **changes)
        processor = load_processor(source, model.config)
        train_classifier(args, accelerator, model, processor, splits)


def finetune_segmenter(args: SegmentationArguments):
    """Fine-tune a segmenter, its decoder made anew where the classes differ."""
    with start_run(args) as accelerator:
        train_segmenter(args, accelerator)


TASKS = {
    "image-classification": (FinetuningArguments, finetune_classifier),
    "semantic-segmentation": (SegmentationArguments, finetune_segmenter),
}


if __name__ == "__main__":
    with exit_with_a_sentence():
        arguments_class, run = TASKS[find_value("task", TASKS)]
        run(parse_arguments(arguments_class))

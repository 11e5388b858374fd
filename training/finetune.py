"""
Fine-tune a model on images with labels or with masks.

    accelerate launch training/finetune.py --task semantic-segmentation --dataset_name ../shared/data/camvid \
        --output_dir runs/camvid
    accelerate launch training/finetune.py --task image-classification --dataset_name you/own --output_dir runs/own

`--dataset_name` takes a hub id, a local folder or a Parquet file; `--config` takes a recipe. `--task TASK --help`
shows all options of a task.
"""

from transformers import AutoModelForImageClassification, AutoModelForSemanticSegmentation

from cbsa_hf import default_checkpoint
from cbsa_hf.checkpoints import load_config, load_processor
from training.arguments import FinetuningArguments, SegmentationArguments, find_value, parse_arguments
from training.data.loading import class_names, problem_type, read_names, select_labelled, select_masked
from training.engine.interruption import exit_with_a_sentence
from training.engine.loop import TrainingRun
from training.engine.setup import check_room, empty_model, load_splits, start_run
from training.tasks.classification import ClassificationTask
from training.tasks.heads import load_for_classes
from training.tasks.segmentation import SegmentationTask, load_segmenter


def finetune_classifier(args: FinetuningArguments):
    """Fine-tune a classifier. If the classes differ, its head is a new one."""
    source = args.model_name_or_path or default_checkpoint()
    with start_run(args) as accelerator:
        check_room(args, accelerator, empty_model(AutoModelForImageClassification, load_config(source)))
        splits = load_splits(args, select_labelled)
        names = dict(enumerate(class_names(splits[0])))
        changes = {"problem_type": problem_type(splits[0])}
        changes |= {} if args.drop_path_rate is None else {"drop_path_rate": args.drop_path_rate}
        model = load_for_classes(AutoModelForImageClassification, source, names, **changes)
        task = ClassificationTask(args, accelerator, model, load_processor(source, model.config), splits)
        TrainingRun(args, accelerator, task).run()


def finetune_segmenter(args: SegmentationArguments):
    """Fine-tune a segmenter. If the classes differ, its decoder is a new one."""
    source = args.model_name_or_path or default_checkpoint()
    with start_run(args) as accelerator:
        check_room(args, accelerator, empty_model(AutoModelForSemanticSegmentation, load_config(source)))
        splits = load_splits(args, select_masked)
        names = read_names(args.id2label, args.dataset_name)
        model, processor = load_segmenter(args, source, names)
        task = SegmentationTask(args, accelerator, model, processor, splits, names)
        TrainingRun(args, accelerator, task).run()


TASKS = {
    "image-classification": (FinetuningArguments, finetune_classifier),
    "semantic-segmentation": (SegmentationArguments, finetune_segmenter),
}


if __name__ == "__main__":
    with exit_with_a_sentence():
        arguments_class, run = TASKS[find_value("task", TASKS, __doc__)]
        run(parse_arguments(arguments_class))

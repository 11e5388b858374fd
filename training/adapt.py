"""
Adapt a pretrained ViT: replace its attention in every layer, keep all weights that still fit, and fine-tune.

    accelerate launch training/adapt.py --model_name_or_path google/vit-base-patch16-224 --dataset_name your/dataset \
        --output_dir runs/adapted --hidden_states_weight 1

`--model_name_or_path` takes ViT, DeiT and DINOv2, of Transformers or timm, by hub id or folder. The script prints the
accuracy of the original and of the model with its attention just replaced, and adds them to `results.json`.
"""

import json
from pathlib import Path

from training.arguments import AdaptationArguments, parse_arguments
from training.data.loading import class_names, problem_type, select_labelled
from training.engine.interruption import exit_with_a_sentence
from training.engine.loop import TrainingRun
from training.engine.output import write_file
from training.engine.setup import check_room, load_splits, start_run
from training.tasks.adaptation import AdaptationTask, load_original, replace_attention


def main(args: AdaptationArguments):
    """Replace the attention of a ViT, score it, and fine-tune it."""
    if args.teacher is not None:
        raise ValueError("`--teacher` is not for adapt.py, whose teacher is the original: `--hidden_states_weight`.")
    with start_run(args) as accelerator:
        original, processor = load_original(args.model_name_or_path)
        check_room(args, accelerator, original)
        splits = load_splits(args, select_labelled)
        names = class_names(splits[0])
        changes = {"problem_type": problem_type(splits[0])}
        changes |= {} if args.drop_path_rate is None else {"drop_path_rate": args.drop_path_rate}
        model = replace_attention(original, args.attention_type, names, **changes)
        task = AdaptationTask(args, accelerator, original, model, processor, splits)
        before = task.score_before(names)
        for name, metrics in before.items():
            accelerator.print(f"{name}: {task.metric} {metrics[task.metric]:.4f}")
        results = TrainingRun(args, accelerator, task).run()
        if accelerator.is_main_process:
            write_file(Path(args.output_dir) / "results.json", json.dumps({**before, **results}, indent=2) + "\n")


if __name__ == "__main__":
    with exit_with_a_sentence():
        main(parse_arguments(AdaptationArguments))

"""The model card that a run leaves beside its weights."""

import os
import platform
import shlex
import sys
from pathlib import Path

import torch
from huggingface_hub import EvalResult, ModelCardData
from transformers import PreTrainedModel


TASK_NAMES = {"accuracy": "image-classification", "mean_iou": "image-segmentation"}


def describe_hardware(processes: int) -> str:
    """What a process of this run computed on, and how many there were."""
    device = f"{os.cpu_count()} cores ({platform.machine()}), no GPU"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return device if processes == 1 else f"{processes} processes, each on: {device}"


def write_card(folder: Path, name: str, model: PreTrainedModel, results: dict, metric: str):
    """
    Write README.md: data, command, seed, hardware, time and metrics. What it cannot know, limits and licence of the
    data, is left to be filled in.

    Args:
        folder: where to write it.
        name: of the model.
        model: what was trained.
        results: content of `results.json`.
        metric: name of the number that stands for the model.
    """
    arguments, metrics = results["arguments"], results["metrics"]
    task = TASK_NAMES[metric]
    scores = [
        EvalResult(
            task_type=task,
            dataset_type=arguments["dataset_name"],
            dataset_name=Path(arguments["dataset_name"]).name,
            dataset_split=arguments["validation_split"],
            metric_type=metric,
            metric_value=round(metrics[metric], 4),
        )
    ]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        license="other",
        tags=list(dict.fromkeys(["cbsa", *model.config.layer_attention_types])),
        model_name=name,
        eval_results=scores,
    )
    step = results["best_step" if arguments["keep_best"] else "step"]
    shown = "\n".join(f"| {key} | {value:.4f} |" for key, value in metrics.items())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    (folder / "README.md").write_text(f"""---
{data.to_yaml()}
---

# {name}

`{type(model).__name__}` of cbsa-hf, {parameters:,} parameters, trained on `{arguments["dataset_name"]}`.

- **Command** (seed {arguments["seed"]}): `{shlex.join(sys.argv)}`
- **Hardware**: {describe_hardware(results["processes"])}; PyTorch {torch.__version__}
- **Time**: {results["seconds"] / 60:.1f} minutes, {results["step"]} steps of {arguments["batch_size"]} images
- **Limits, and the licence of the data**: to be filled in by whoever publishes this.

| `{arguments["validation_split"]}` | after step {step} |
|---|---|
{shown}
""")

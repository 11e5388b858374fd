"""What a run leaves behind: the trained model, its image processor, its model card, and `results.json`."""

import json
import os
import platform
import shlex
import sys
from pathlib import Path

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import BaseImageProcessor, PreTrainedModel

from cbsa_hf.checkpoints.model_cards import auto_class_of, base_model_of, loading_example
from training.engine.output import write_together
from training.engine.run_state import DamagedCheckpoint, check_sums, checkpoint_path, read_progress


TASK_NAMES = {  # on the Hub, by metric
    "accuracy": "image-classification",
    "mean_average_precision": "image-classification",
    "mean_iou": "image-segmentation",
}
CARD = """\
---
{{ card_data }}
---

# {{ name }}

`{{ model_class }}` of cbsa-hf, {{ parameters }} parameters, trained on `{{ dataset_name }}`.

- **Command** (seed {{ seed }}): `{{ command }}`
- **Hardware**: {{ hardware }}; PyTorch {{ torch_version }}
- **Time**: {{ minutes }} minutes, {{ step }} steps of {{ batch_size }} images
- **Limits, and the licence of the data**: to be filled in by whoever publishes this.

| `{{ split }}` | after step {{ scored_step }} |
|---|---|
{{ rows }}

## Use

{{ example }}
"""


def describe_hardware(processes: int) -> str:
    """The device of one process, and how many processes there were."""
    device = f"{os.cpu_count()} cores ({platform.machine()}), no GPU"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return device if processes == 1 else f"{processes} processes, each on: {device}"


def public_name(value: str) -> str:
    """A hub id as it is; of a path on this machine, which says nothing to others, the last part alone."""
    is_path = os.path.isabs(value) or os.path.exists(value)
    return (Path(value).name or value) if is_path else value


def public_command(arguments: list[str]) -> str:
    """A command line for a shell, without the folders of this machine."""
    parts = [argument.rpartition("=") for argument in arguments]
    return shlex.join(f"{option}{equals}{public_name(value)}" for option, equals, value in parts)


def write_card(folder: Path, name: str, model: PreTrainedModel, results: dict, metric: str):
    """
    Write README.md: data, command, seed, hardware, time and metrics. The limits of the model and the licence of the
    data are left for its publisher to fill in.

    Args:
        folder: where to write it.
        name: of the model.
        model: the trained model.
        results: content of `results.json`.
        metric: name of the metric that the model card shows first.
    """
    arguments, metrics = results["arguments"], results["metrics"]
    task, dataset_name = TASK_NAMES[metric], public_name(arguments["dataset_name"])
    origin = arguments.get("model_name_or_path")
    score = EvalResult(
        task_type=task,
        dataset_type=dataset_name,
        dataset_name=Path(dataset_name).name,
        dataset_split=arguments["validation_split"],
        metric_type=metric,
        metric_value=round(metrics[metric], 4),
    )
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        license="other",
        base_model=None if origin is None else base_model_of(origin),
        tags=list(dict.fromkeys(["cbsa", *model.config.layer_attention_types])),
        model_name=name,
        eval_results=[score],
    )
    card = ModelCard.from_template(
        data,
        template_str=CARD,
        name=name,
        model_class=type(model).__name__.removeprefix("FSDP"),  # of sharded models
        parameters=f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        dataset_name=dataset_name,
        seed=arguments["seed"],
        command=public_command(sys.argv),
        hardware=describe_hardware(results["processes"]),
        torch_version=torch.__version__,
        minutes=f"{results['seconds'] / 60:.1f}",
        step=results["step"],
        batch_size=arguments["batch_size"],
        split=arguments["validation_split"],
        scored_step=results["best_step" if arguments["keep_best"] else "step"],
        rows="\n".join(f"| {key} | {value:.4f} |" for key, value in metrics.items()),
        example=loading_example(name, auto_class_of(model)),
    )
    card.save(folder / "README.md")


def load_best(output_dir: Path, step: int, averaged: bool) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """
    Weights and metrics of the best checkpoint.

    Args:
        output_dir: folder of the run.
        step: step of the checkpoint.
        averaged: load the moving average of the weights.

    Raises:
        ValueError: if the checkpoint is damaged.
    """
    best = checkpoint_path(output_dir, step)
    try:
        check_sums(best)
        weights = load_file(best / ("average.safetensors" if averaged else "model.safetensors"))
        return weights, read_progress(best).metrics
    except (OSError, SafetensorError, DamagedCheckpoint) as error:
        raise ValueError(
            f"The best checkpoint, {best}, is damaged ({error}); for the weights of the last step: "
            "`--resume_from_checkpoint last --keep_best false`."
        ) from error


def model_weights(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of the model in a state of the losses, without the prefixes of `torch.compile` and of averages."""
    names = {name: name.replace("_orig_mod.", "").removeprefix("module.") for name in state}
    return {new.removeprefix("model."): state[old] for old, new in names.items() if new.startswith("model.")}


def write_results(
    output_dir: Path,
    model: PreTrainedModel,
    state: dict[str, torch.Tensor],
    processor: BaseImageProcessor,
    results: dict,
    metric: str,
):
    """
    Write the trained model, its image processor, its card and `results.json`: all of them, or nothing.

    Args:
        output_dir: where to write.
        model: gives configuration and class.
        state: weights of the losses; see [`model_weights`].
        processor: the model's image processor.
        results: content of `results.json`.
        metric: see [`write_card`].

    Raises:
        ValueError: if they cannot be written.
    """
    try:
        with write_together(output_dir, last="results.json") as folder:
            model.save_pretrained(folder, state_dict=model_weights(state))
            processor.save_pretrained(folder)
            write_card(folder, output_dir.resolve().name, model, results, metric)
            (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"The result cannot be written to {output_dir} ({error}); make room, and "
            "`--resume_from_checkpoint last` writes it."
        ) from error

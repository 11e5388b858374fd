"""Optimisers, what they decay, how fast each layer learns, and the schedule of the learning rate."""

import math
import re

import pytorch_optimizer
import torch
from pytorch_optimizer.optimizer.utils.matrix import zero_power_via_newton_schulz_5
from torch import nn
from transformers import get_scheduler


STATES = {"adamw": 2, "lion": 1, "muon": 1, "sgd": 1}  # numbers that each keeps for most weights

LAYER = re.compile(r"\blayers?\.(\d+)\.")


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Matrices and kernels decay; norms, biases, steps, CLS, classes, positions and representatives do not."""
    return parameter.ndim >= 2 and name.endswith("weight") and "representatives" not in name


def depth(name: str, num_layers: int) -> int:
    """0 for the embeddings, i + 1 for layer i, `num_layers + 1` for everything behind the encoder's layers."""
    if "decoder" in name:
        return num_layers + 1
    if "embeddings" in name:
        return 0
    layer = LAYER.search(name)
    return num_layers + 1 if layer is None else int(layer[1]) + 1


def parameter_groups(
    model: nn.Module, num_layers: int, learning_rate: float, weight_decay: float, layer_decay: float
) -> list[dict]:
    """
    Groups for an optimiser, each with its own learning rate and decay; `use_muon` marks the encoder's matrices and
    kernels.

    Args:
        model: whose parameters that need a gradient are grouped.
        num_layers: number of layers of the encoder.
        learning_rate: of what stands behind the layers.
        weight_decay: of matrices and kernels.
        layer_decay: factor on the learning rate from each layer to the one before it (arXiv 2106.08254); 1 for none.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = depth(name, num_layers), is_decayed(name, parameter)
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": learning_rate * layer_decay ** (num_layers + 1 - level),
            "weight_decay": weight_decay if decayed else 0.0,
            "use_muon": decayed and level <= num_layers,
        }
        for (level, decayed), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


class Muon(pytorch_optimizer.Muon):
    """Muon whose Newton-Schulz steps are float32 on a CPU: many only emulate bfloat16, twenty times as slowly."""

    @staticmethod
    def _orthogonalize(group: dict, updates: list[torch.Tensor]) -> list[torch.Tensor]:
        if updates[0].device.type != "cpu":
            return pytorch_optimizer.Muon._orthogonalize(group, updates)
        settings = {"num_steps": group["ns_steps"], "weights": group["ns_coeffs"], "dtype": torch.float32}
        return [zero_power_via_newton_schulz_5(update.flatten(1), **settings) for update in updates]


def build_optimizer(name: str, groups: list[dict], learning_rate: float) -> torch.optim.Optimizer:
    """
    One of [`OPTIMIZERS`] over the groups; each optimiser's other settings are its usual ones. Muon is scaled so that
    AdamW's learning rates suit it (arXiv 2502.16982), and leaves what it is not for to AdamW.
    """
    if name == "lion":
        return pytorch_optimizer.Lion(groups, lr=learning_rate)
    if name == "muon":
        optimizer = Muon(groups, use_adjusted_lr=True)
        optimizer.defaults["lr"] = learning_rate  # where the polynomial schedule looks for it
        return optimizer
    if name == "sgd":
        return torch.optim.SGD(groups, lr=learning_rate, momentum=0.9)
    return torch.optim.AdamW(groups, lr=learning_rate)


def build_scheduler(
    name: str, optimizer: torch.optim.Optimizer, num_steps: int, num_warmup_steps: float
) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear warm-up, then one of [`SCHEDULES`] down to 0; the polynomial's power is 0.9, as the segmenters use it."""
    settings = {"power": 0.9, "lr_end": 0.0} if name == "polynomial" else None
    return get_scheduler(name, optimizer, math.ceil(num_warmup_steps), num_steps, scheduler_specific_kwargs=settings)

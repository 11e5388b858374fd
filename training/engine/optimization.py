"""Optimisers, groups of parameters, and schedules of the learning rate."""

import math
import re
from collections.abc import Sequence

import pytorch_optimizer
import torch
from pytorch_optimizer.optimizer.utils.matrix import zero_power_via_newton_schulz_5
from torch import nn
from transformers import get_scheduler


STATES = {"adamw": 2, "lion": 1, "muon": 1, "sgd": 1}  # numbers that each optimiser keeps for most weights

LAYER = re.compile(r"\blayers?\.(\d+)\.")


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """
    Whether weight decay applies: to matrices and kernels; not to norms, biases, step sizes, nor to the embeddings of
    CLS, classes, positions and representatives.
    """
    return parameter.ndim >= 2 and name.endswith("weight") and "representatives" not in name


def depth(name: str, layer_indices: Sequence[int]) -> int:
    """
    The depth of a parameter: 0 in the embeddings, i + 1 in layer i of L, L + 1 behind the layers. Weights that layers
    share have the depth of the last of these.
    """
    if "embeddings" in name and "decoder" not in name:
        return 0
    layer = None if "decoder" in name else LAYER.search(name)
    if layer is None:
        return len(layer_indices) + 1
    last_uses = {index: i for i, index in enumerate(layer_indices)}
    return last_uses.get(int(layer[1]), int(layer[1])) + 1


def parameter_groups(
    model: nn.Module, layer_indices: Sequence[int], learning_rate: float, weight_decay: float, layer_decay: float
) -> list[dict]:
    """
    Divide the parameters that need a gradient into groups with a learning rate and a weight decay of their own. In the
    groups of the encoder's matrices and kernels, `use_muon` is true.

    Args:
        model: whose parameters to divide.
        layer_indices: the stored layer that each layer of the encoder uses: 0, 1, 2, ... if no layers share weights.
        learning_rate: of the parameters behind the layers.
        weight_decay: of matrices and kernels.
        layer_decay: factor on the learning rate from each layer to the one before it (arXiv 2106.08254); 1 for none.
    """
    groups, num_layers = {}, len(layer_indices)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = depth(name, layer_indices), is_decayed(name, parameter)
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
    """
    Muon with float32 in its Newton-Schulz steps on a CPU: many CPUs emulate bfloat16, which takes 20 times as long.
    The library has no option for this dtype, so a private method is overridden.
    """

    @staticmethod
    def _orthogonalize(group: dict, updates: list[torch.Tensor]) -> list[torch.Tensor]:
        if updates[0].device.type != "cpu":
            return pytorch_optimizer.Muon._orthogonalize(group, updates)
        settings = {"num_steps": group["ns_steps"], "weights": group["ns_coeffs"], "dtype": torch.float32}
        return [zero_power_via_newton_schulz_5(update.flatten(1), **settings) for update in updates]


def build_optimizer(name: str, groups: list[dict], learning_rate: float) -> torch.optim.Optimizer:
    """
    Build one of [`OPTIMIZERS`] for groups of parameters, with its usual settings.

    Muon's updates are scaled so that the learning rates of AdamW suit it (arXiv 2502.16982). It uses AdamW for the
    groups that are not marked for Muon.

    Args:
        name: of the optimiser.
        groups: from [`parameter_groups`].
        learning_rate: the largest of the groups'.
    """
    if name == "lion":
        return pytorch_optimizer.Lion(groups, lr=learning_rate)
    if name == "muon":
        optimizer = Muon(groups, use_adjusted_lr=True)
        optimizer.defaults["lr"] = learning_rate  # the polynomial schedule reads it there
        return optimizer
    if name == "sgd":
        return torch.optim.SGD(groups, lr=learning_rate, momentum=0.9)
    return torch.optim.AdamW(groups, lr=learning_rate)


def build_scheduler(
    name: str, optimizer: torch.optim.Optimizer, num_steps: int, num_warmup_steps: float
) -> torch.optim.lr_scheduler.LRScheduler:
    """
    Linear warm-up, then one of [`SCHEDULES`] down to 0. The power of the polynomial is 0.9, usual in segmentation.
    """
    settings = {"power": 0.9, "lr_end": 0.0} if name == "polynomial" else None
    return get_scheduler(name, optimizer, math.ceil(num_warmup_steps), num_steps, scheduler_specific_kwargs=settings)

"""What the examples share: a small CBSA encoder and a ViT of the same sizes, training, and what a step costs."""

import statistics
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable

import torch
from torch import nn
from transformers import Dinov2Config, PreTrainedConfig

from cbsa_hf import CBSAConfig


SIZES = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 96, "patch_size": 8}
ENCODERS = ("cbsa", "vit")
ROUNDS = 7


def encoder_config(name: str, **values) -> PreTrainedConfig:
    """The configuration of an encoder in `ENCODERS`; the ViT is Transformers' DINOv2 with random weights."""
    if name == "cbsa":
        return CBSAConfig(**SIZES, representatives_size=6, **values)
    return Dinov2Config(**SIZES, **values)


def parse_options(description: str, num_steps: int, argv: list[str] | None = None) -> Namespace:
    """The options of an example."""
    parser = ArgumentParser(description=description)
    parser.add_argument("--encoder", choices=ENCODERS, default="cbsa", help="which encoder (%(default)s)")
    parser.add_argument("--num_images", type=int, default=16, help="images to learn (%(default)s)")
    parser.add_argument("--num_steps", type=int, default=num_steps, help="steps of training (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of images and weights (%(default)s)")
    parser.add_argument("--cost", action="store_true", help="compare the time of a step with both encoders instead")
    return parser.parse_args(argv)


def train(model: nn.Module, compute_loss: Callable[[], torch.Tensor], num_steps: int, learning_rate: float):
    """AdamW on one batch that stays the same, with a tenth of warm-up and a cosine; prints ten losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, num_steps, pct_start=0.1)
    model.train()
    for step in range(1, num_steps + 1):
        loss = compute_loss()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % max(num_steps // 10, 1) == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    model.eval()


def compare_cost(step: dict[str, Callable[[], object]]) -> float:
    """
    How many times the processor time of the ViT's step CBSA's step takes: both run in turns, and medians are compared.
    """
    times = {name: [] for name in step}
    for turn in range(ROUNDS + 1):
        for name, run in step.items():
            start = time.process_time()
            run()
            if turn > 0:  # the first turn warms up
                times[name].append(time.process_time() - start)
    return statistics.median(times["cbsa"]) / statistics.median(times["vit"])

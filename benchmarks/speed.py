"""
Measure how fast the models are: the reference implementation's formulas, this library, the folded model, compiled and
exported models, a ViT of the same width, and the necessary matrix products alone ("floor").

    python benchmarks/speed.py --quick          # two minutes: tiny at 224 pixels, OpenVINO the only engine
    python benchmarks/speed.py --training       # images/s of a training step, and its memory
    python benchmarks/speed.py --tokens         # time and memory for each patch, from 196 to 262,144 of them
    python benchmarks/speed.py --output table.md    # an hour and more; the figure goes beside it
    python benchmarks/speed.py --device cuda --output gpu.md

All models run in one process and take turns; compare the times of a table as ratios. Each time is the median over the
rounds, with the distance between the quartiles. Slow models get fewer rounds. With one thread on a CPU it is processor
time, which other processes disturb least. Memory is the peak of what torch allocates beside weights and input.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MethodType

import numpy as np
import torch
import transformers
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTConfig, ViTForImageClassification

from benchmarks import zero_shot_cost
from benchmarks.workbench import table
from cbsa_hf import CBSAConfig, CBSAForImageClassification, fold, preset_path
from cbsa_hf.attention_cbsa import ContractAndBroadcastSelfAttention
from cbsa_hf.exporting import FORMATS, OneOutput, open_export, trace
from cbsa_hf.interpretability.plots import line_panels
from cbsa_hf.modeling_cbsa import CBSAISTA, CBSAConvStem, CBSALayer
from training.engine.memory import keep_freed_memory


SECONDS = 20.0  # a slower pass runs once; none, if a smaller image took over a quarter of this
DRAWN = ("reference", "this library", "folded, torch.compile", "folded, OpenVINO", "ViT, sdpa", "floor")
ENGINES = ("torch.compile", "onnx", "openvino")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


Run = Callable[[], object]


def reference_stem(self, pixel_values):
    """The stem of the reference implementation: it keeps the memory layout of its input."""
    return self.layers(pixel_values)


def reference_attention(self, hidden_states, grid, output_attentions=False, output_representative_attentions=False):
    """The operator of the reference implementation: it multiplies the update of every token by the last step size."""
    projected, start = self.proj(hidden_states), self.representatives.first_token
    patches = projected[:, start : start + grid[0] * grid[1]].unflatten(1, grid).contiguous().permute(0, 3, 1, 2)
    representatives = F.adaptive_avg_pool2d(patches, self.representatives.size).flatten(2).transpose(1, 2)
    tokens, representatives = self.split_heads(projected), self.split_heads(representatives)
    attention = torch.softmax((representatives @ tokens.transpose(-1, -2)) * self.scaling, dim=-1)
    representatives = representatives + self.step_rep * (attention @ tokens)
    contraction = torch.softmax((representatives @ representatives.transpose(-1, -2)) * self.scaling, dim=-1)
    update = self.step_x * (attention.transpose(-1, -2) @ (contraction @ representatives))
    return self.merge_heads(update), None, attention


def reference_ista(self, hidden_states):
    """ISTA of the reference implementation: three matrix products."""
    coded = F.linear(F.linear(hidden_states, self.weight), self.weight.t())
    gradient = F.linear(hidden_states, self.weight.t())
    return F.relu(hidden_states + self.step_size * (gradient - coded) - self.step_size * self.threshold)


REFERENCE = {
    CBSAConvStem: reference_stem,
    ContractAndBroadcastSelfAttention: reference_attention,
    CBSAISTA: reference_ista,
}


def as_reference(model: CBSAForImageClassification) -> CBSAForImageClassification:
    """A model with the same weights and the formulas of the reference implementation, which has no size factor."""
    model = deepcopy(model)
    for module in model.modules():
        if type(module) in REFERENCE:
            module.forward = MethodType(REFERENCE[type(module)], module)
        if isinstance(module, CBSALayer):
            module.takes_tiles = lambda hidden_states: False
    return model


class Floor(nn.Module):
    """Only the convolutions and matrix products of a folded model, with the same shapes."""

    def __init__(self, folded: CBSAForImageClassification):
        super().__init__()
        self.convolutions = nn.ModuleList(m for m in folded.modules() if isinstance(m, nn.Conv2d))
        self.layers = folded.cbsa.layers

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(batch, 3, height, width) -> (batch, tokens, width)."""
        hidden_states = pixel_values
        for convolution in self.convolutions:
            hidden_states = convolution(hidden_states)
        hidden_states = hidden_states.flatten(2).transpose(1, 2)
        for layer in self.layers:
            operator = layer.attention
            tokens = operator.split_heads(operator.proj(hidden_states))
            height, width = operator.representatives.size
            attention = tokens[:, :, : height * width] @ tokens.transpose(2, 3)
            representatives = attention @ tokens
            contracted = representatives @ representatives.transpose(2, 3) @ representatives
            hidden_states = operator.merge_heads(attention.transpose(2, 3) @ contracted)
            hidden_states = F.linear(hidden_states, layer.feed_forward.weight, layer.feed_forward.bias)
        return hidden_states


@dataclass(frozen=True)
class Cell:
    """One setting that is measured: published size, side of the images in pixels, batch size, and precision."""

    size: str
    pixels: int
    batch_size: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.size}, {self.pixels} px, batch {self.batch_size}, {self.dtype}"

    @property
    def config(self) -> CBSAConfig:
        """The configuration of that size, for that side, with 1000 classes."""
        return CBSAConfig.from_pretrained(preset_path(f"cbt-{self.size}"), image_size=self.pixels, num_labels=1000)

    @property
    def num_patches(self) -> int:
        """Number of patches of an image."""
        return (self.pixels // 16) ** 2


def export(model: nn.Module, format: str, pixel_values: np.ndarray, **options) -> Run:
    """A run of what `cbsa export` writes of a folded model, as it is. All other models are exported for this size."""
    single = model if isinstance(model, Floor) else OneOutput(model)
    with TemporaryDirectory() as folder:
        with torch.no_grad():
            if isinstance(model, CBSAForImageClassification) and model.config.folded:
                program = trace(single, model.config)
            else:
                program = torch.export.export(single, (torch.from_numpy(pixel_values),))
        FORMATS[format].write(program, "logits", Path(folder) / FORMATS[format].file)
        engine = open_export(folder, **options)
        engine(pixel_values)  # while the file is there, from which OpenVINO compiles for this shape
    return partial(engine, pixel_values)


def build_vit(config: CBSAConfig) -> ViTForImageClassification:
    """A ViT with the same width, depth, number of heads and patch size."""
    names = ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_labels")
    values = {name: getattr(config, name) for name in names}
    return ViTForImageClassification(ViTConfig(**values, intermediate_size=4 * config.hidden_size))


def build_models(cell: Cell, device: str) -> dict[str, nn.Module]:
    """The models to measure, with random weights, in evaluation mode."""
    config = cell.config
    model = CBSAForImageClassification(config).eval()
    folded = fold(model)
    models = {
        "reference": as_reference(model),
        "this library": model,
        "folded": folded,
        "ViT, sdpa": build_vit(config).eval(),
        "floor": Floor(folded),
    }
    return {name: module.to(device, DTYPES[cell.dtype]) for name, module in models.items()}


def example_pixels(cell: Cell, device: str) -> torch.Tensor:
    """Random images of a cell, (batch, 3, pixels, pixels), the same at every call."""
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.randn(cell.batch_size, 3, cell.pixels, cell.pixels, generator=generator)
    return pixel_values.to(device, DTYPES[cell.dtype])


def build_runs(cell: Cell, models: dict[str, nn.Module], engines: list[str], device: str) -> dict[str, Run]:
    """The functions to measure, by name; with `engines` also compiled and exported models."""
    pixel_values = example_pixels(cell, device)
    runs = {name: lambda model=model: model(pixel_values) for name, model in models.items()}
    if "torch.compile" in engines:
        # On a CPU it takes half a minute to compile a model, so only the fastest way to use this library is compiled.
        for name in ("reference", "folded", "ViT, sdpa", "floor") if device == "cuda" else ("folded",):
            # On a GPU, Inductor tries kernels and takes the fastest; on a CPU, it packs the weights once ("freezing").
            options = {"mode": "max-autotune"} if device == "cuda" else {"options": {"freezing": True}}
            engine = torch.compile(models[name], **options)
            runs[f"{name}, torch.compile"] = lambda engine=engine: engine(pixel_values)
    if device == "cuda":
        return runs
    array = pixel_values.float().numpy()
    if "openvino" in engines:
        # To export these for larger images takes minutes.
        others = ("reference", "ViT, sdpa") if cell.pixels <= 512 else ()
        for name in ("folded", "floor", *others):
            module = deepcopy(models[name]).float()
            runs[f"{name}, OpenVINO"] = export(module, "openvino", array, precision=cell.dtype)
    if "onnx" in engines and cell.dtype == "float32":
        runs["folded, ONNX Runtime"] = export(models["folded"], "onnx", array)
    return runs


def now(device: str) -> float:
    """Processor time in seconds if one thread computes on a CPU, else wall time, after the GPU has finished."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def seconds_of(run: Run, device: str) -> float:
    """Seconds of one run; see [`now`]."""
    started = now(device)
    run()
    return now(device) - started


def repeat(run: Run, times: int):
    """Runs it several times."""
    for _ in range(times):
        run()


def peak_memory(run: Run, device: str) -> float:
    """Peak memory of one run in MiB, without weights and input."""
    if device == "cpu":
        return zero_shot_cost.peak_memory(run)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def training_step(model: nn.Module, pixel_values: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    """A function that runs forward and backward, without an optimiser."""

    def step():
        model(pixel_values, labels=labels).loss.backward()
        model.zero_grad()

    return step


def measure_training(cell: Cell, patch_size: int, rounds: int, device: str) -> str:
    """Measure images per second of forward and backward, and peak memory of a step. Returns a table in Markdown."""
    values = {"image_size": cell.pixels, "patch_size": patch_size, "num_labels": 1000}
    config = CBSAConfig.from_pretrained(preset_path(f"cbt-{cell.size}"), **values)
    model = CBSAForImageClassification(config)
    models = {"reference": as_reference(model), "this library": model, "ViT, sdpa": build_vit(config)}
    pixel_values, labels = example_pixels(cell, device), torch.arange(cell.batch_size, device=device)
    steps = {
        name: training_step(module.to(device, DTYPES[cell.dtype]).train(), pixel_values, labels)
        for name, module in models.items()
    }
    memory = {name: peak_memory(step, device) for name, step in steps.items()}
    times = [{name: seconds_of(step, device) for name, step in steps.items()} for _ in range(rounds)]
    rows = []
    for name in steps:
        speed = cell.batch_size / statistics.median(row[name] for row in times)
        ratio = statistics.median(row["reference"] / row[name] for row in times)
        rows.append([name, f"{speed:.1f}", f"{ratio:.2f}", f"{memory[name]:.0f}"])
    header = ["", "images/s", "times as fast as the reference", "peak MiB"]
    return f"### Training: {cell}, patches of {patch_size} px\n\n{table(header, rows)}\n"


@torch.no_grad()
def measure_tokens(size: str, rounds: int, device: str) -> str:
    """Time and memory of the folded model, one image, for each patch, as a table in Markdown."""
    rows, least = [], float("inf")
    for pixels in (224, 512, 1024, 2048, 4096, 8192):
        cell = Cell(size, pixels, 1, "float32")
        run = partial(fold(CBSAForImageClassification(cell.config)).to(device), example_pixels(cell, device))
        memory = peak_memory(run, device) * 2**20 / (cell.num_patches * cell.config.hidden_size)
        repeats = max(4096 // cell.num_patches, 1)  # a small image alone says more of the caches before than of itself
        run = partial(repeat, run, repeats)
        seconds = statistics.median(seconds_of(run, device) for _ in range(rounds if pixels < 4096 else 1))
        microseconds = 1e6 * seconds / repeats / cell.num_patches
        least = min(least, microseconds)
        rows.append([pixels, f"{cell.num_patches:,}", microseconds, f"{memory:.1f}"])
    rows = [[*row[:2], f"{row[2]:.0f}", f"{row[2] / least:.2f}", row[3]] for row in rows]
    header = ["side in pixels", "patches", "µs a patch", "of the least", "peak bytes a patch and width"]
    return f"### Many patches: {size}, folded, batch 1, float32\n\n{table(header, rows)}\n"


@torch.no_grad()
def measure_cell(cell: Cell, rounds: int, engines: list[str], skipped: set[str], device: str) -> dict[str, dict]:
    """Time, spread, memory and operations of each model. Names of models that are too slow are added to `skipped`."""
    models = build_models(cell, device)
    runs = {name: run for name, run in build_runs(cell, models, engines, device).items() if name not in skipped}
    found = {}
    for name, run in runs.items():
        if name not in models:
            run()  # compiles
        first = seconds_of(run, device)
        found[name] = row = {"once": first > SECONDS, "first": first, "times": [first] if first > SECONDS else []}
        if first > SECONDS / 4:
            skipped.add(name)
        if row["once"]:
            continue
        if not name.endswith(("OpenVINO", "ONNX Runtime")):  # what they hold, torch does not see
            row["memory"] = peak_memory(run, device)
        if name in models:
            with FlopCounterMode(display=False) as counter:
                deepcopy(models[name]).to("meta")(example_pixels(cell, "meta"))
            row["flops"] = counter.get_total_flops() / cell.batch_size
    for index in range(rounds):
        for name, run in runs.items():
            row = found[name]
            if not row["once"] and (index == 0 or (index + 1) * row["first"] < SECONDS):
                row["times"].append(seconds_of(run, device))
    for row in found.values():
        milliseconds = [1000 * value / cell.batch_size for value in row["times"]]
        row["ms"] = statistics.median(milliseconds)
        row["spread"] = float(np.subtract(*np.percentile(milliseconds, [75, 25])))
    base = found.get("reference", found["this library"])["times"]
    for row in found.values():
        # Of the same round, in which other processes disturb all alike; of a single run where there are no rounds.
        row["ratio"] = statistics.median(one / other for one, other in zip(base, row["times"], strict=False))
    return found


def describe(cell: Cell, found: dict[str, dict], skipped: set[str]) -> str:
    """The cell as a table in Markdown, each contestant also as a ratio to the reference."""
    rows = [
        [
            name,
            f"{row['ms']:.1f} ± {row['spread']:.1f}" + (" (one run)" if row["once"] else ""),
            f"{row['ratio']:.2f}",
            f"{row['memory']:.0f}" if "memory" in row else "",
            f"{row['flops'] / 1e9:.2f}" if "flops" in row else "",
        ]
        for name, row in found.items()
    ]
    rows += [[name, "left out: too slow", "", "", ""] for name in sorted(skipped - found.keys())]
    header = ["", "ms an image", "times as fast as the reference", "peak MiB", "GFLOPs an image"]
    return f"### {cell}\n\n{table(header, rows)}\n"


def draw(results: dict[Cell, dict[str, dict]]) -> Image.Image:
    """Time against patches, both logarithmic, of the first size, batch and precision; lines end where it took long."""
    first = next(iter(results))
    kind = (first.size, first.batch_size, first.dtype)
    cells = [cell for cell in results if (cell.size, cell.batch_size, cell.dtype) == kind]
    names = [name for name in DRAWN if any(name in results[cell] for cell in cells)]
    panel = {
        "title": f"{first.size}, batch of {first.batch_size}, {first.dtype}",
        "x": "patches",
        "y": "milliseconds an image",
        "positions": [cell.num_patches for cell in cells],
        "lines": {name: [[results[cell].get(name, {"ms": np.nan})["ms"] for cell in cells]] for name in names},
        "scale": "log",
    }
    return line_panels([panel], width=6.0, height=4.2)


def describe_machine(device: str) -> str:
    """Processor, GPU if it is used, and versions."""
    name, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        name = next(line.split(": ")[1] for line in info.read_text().splitlines() if line.startswith("model name"))
    gpu = f"{torch.cuda.get_device_name()}, " if device == "cuda" else ""
    return (
        f"{gpu}{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )


def write_page(args: argparse.Namespace):
    """Measure every cell, and write the table and its figure."""
    results, pages = {}, []
    for size in args.sizes:
        for dtype in args.dtypes:
            for batch_size in args.batch_sizes:
                skipped = set()
                for pixels in args.pixels:
                    cell = Cell(size, pixels, batch_size, dtype)
                    left_out = skipped.copy()
                    results[cell] = measure_cell(cell, args.rounds, args.engines, skipped, args.device)
                    pages.append(describe(cell, results[cell], left_out))
                    print(pages[-1], flush=True)
                    torch.compiler.reset()
    output = Path(args.output)
    header = f"{describe_machine(args.device)}.\n\n![Time against tokens]({output.stem}.png)\n"
    output.write_text("\n".join([header, *pages]))
    draw(results).save(output.with_suffix(".png"))


def main():
    """Print a short table, or measure everything and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--quick", action="store_true", help="measure only tiny at 224 pixels, and write no file")
    parser.add_argument("--training", action="store_true", help="measure only training steps, and write no file")
    parser.add_argument("--tokens", action="store_true", help="measure only images of many sizes, and write no file")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--engines", nargs="*", default=list(ENGINES), choices=ENGINES, help="beside eager PyTorch")
    parser.add_argument("--sizes", nargs="+", default=["tiny", "small", "base"])
    parser.add_argument("--pixels", nargs="+", type=int, default=[224, 512, 1024, 2048])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", help="Markdown file to write; the figure goes beside it")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here; leave --device out")
    torch.set_flush_denormal(True)  # the values in `Floor` shrink from layer to layer; denormal numbers are slow
    keep_freed_memory()
    if args.quick:
        args.engines = [engine for engine in args.engines if engine == "openvino"]
        cell = Cell("tiny", 224, 4, "float32")
        print(describe_machine(args.device))
        print(describe(cell, measure_cell(cell, args.rounds, args.engines, set(), args.device), set()))
    elif args.training:
        print(describe_machine(args.device))
        for size, pixels, patch_size in (("tiny", 224, 16), ("small", 224, 16), ("tiny", 128, 8)):
            cell = Cell(size, pixels, 8, args.dtypes[0])
            print(measure_training(cell, patch_size, args.rounds, args.device), flush=True)
    elif args.tokens:
        print(describe_machine(args.device))
        print(measure_tokens(args.sizes[0], args.rounds, args.device))
    elif args.output is None:
        parser.error("give --output, the Markdown file to write, or one of --quick, --training and --tokens")
    else:
        write_page(args)


if __name__ == "__main__":
    main()

"""Export of a model to the engines that people deploy on, checked against the model itself."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np
import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from transformers import BaseImageProcessor

from .attention_cbsa import to_pair
from .folding import fold
from .modeling_cbsa import CBSAForSemanticSegmentation, CBSAModel, CBSAPreTrainedModel


Engine = Callable[[np.ndarray], np.ndarray]
"""Takes `pixel_values` (batch, channels, height, width); returns the logits, or the tokens of an encoder."""

TOLERANCE = 1e-4  # of the largest output, in float32; engines add up products in another order


class OneOutput(nn.Module):
    """A model of any size of image that returns one tensor: the logits, or the tokens of an encoder."""

    def __init__(self, model: CBSAPreTrainedModel):
        super().__init__()
        self.model = model
        self.name = "last_hidden_state" if isinstance(model, CBSAModel) else "logits"
        takes_every_size = isinstance(model, CBSAForSemanticSegmentation)
        self.options = {} if takes_every_size else {"interpolate_pos_encoding": True}

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values, **self.options)[self.name]


def to_onnx(program: ExportedProgram, name: str, folder: Path) -> Engine:
    """Write `model.onnx`, with the weights in it or beside it, and open it in ONNX Runtime."""
    import onnxruntime

    path = folder / "model.onnx"
    torch.onnx.export(program, input_names=["pixel_values"], output_names=[name], dynamo=True, verbose=False).save(
        path
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda pixel_values: session.run([name], {"pixel_values": pixel_values})[0]


FORMATS = {"onnx": to_onnx}


@dataclass(frozen=True)
class ExportCheck:
    """
    How an exported model compares with the model itself.

    Args:
        difference: the largest difference of their outputs, as a share of the largest output.
        eager_time: median time of the model in seconds, for one image of its own size.
        engine_time: the same of the exported model.
    """

    difference: float
    eager_time: float
    engine_time: float


def check_export(model: OneOutput, engine: Engine, shapes: list[tuple[int, int, int, int]]) -> ExportCheck:
    """Compare the outputs for noise of these shapes, and the times for the first of them, in turns."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(shape, generator=generator) for shape in shapes]
    differences = []
    for batch in batches:
        expected, found = model(batch).numpy(), engine(batch.numpy())
        differences.append(float(np.abs(found - expected).max() / np.abs(expected).max()))
    times = []
    for _ in range(5):
        start = perf_counter()
        model(batches[0])
        between = perf_counter()
        engine(batches[0].numpy())
        times.append((between - start, perf_counter() - between))
    eager_time, engine_time = (median(column) for column in zip(*times, strict=True))
    return ExportCheck(max(differences), eager_time, engine_time)


@torch.no_grad()
def export_model(
    model: CBSAPreTrainedModel, processor: BaseImageProcessor, output: Path, format: str = "onnx"
) -> ExportCheck:
    """
    Write a model for another engine, for every batch size and image size, with its image processor.

    The model is folded and in float32. What was written is run on images of three sizes and compared with the model.

    Args:
        model: an encoder, a classifier or a segmenter; it stays as it is.
        processor: its image processor.
        output: the folder to write, new or empty.
        format: a name in [`FORMATS`].

    Returns:
        The differences and times that were found.

    Raises:
        ValueError: if the format is unknown, if a package that it needs is missing, or if the outputs differ by more
            than [`TOLERANCE`]; then nothing is written.
    """
    if format not in FORMATS:
        raise ValueError(f"There is no format {format!r}; choose one of {', '.join(map(repr, FORMATS))}.")
    plain = OneOutput(deepcopy(model).eval().float())
    folded = OneOutput(fold(plain.model))
    height, width = to_pair(model.config.image_size)
    side = model.config.patch_size
    channels = model.config.num_channels
    # The size of the training; an odd one that fills no patch at the edges; another ratio.
    shapes = [
        (1, channels, height, width),
        (2, channels, height + 1, width + side + 3),
        (1, channels, height, 2 * width),
    ]
    program = torch.export.export(
        folded,
        (torch.zeros(2, channels, height + side, width + 2 * side),),
        dynamic_shapes={"pixel_values": {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}},
    )
    with TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as partial:
        folder = Path(partial) / output.name
        folder.mkdir()
        try:
            engine = FORMATS[format](program, plain.name, folder)
        except ImportError as error:
            raise ValueError(f"The format {format!r} needs more packages: `pip install cbsa-hf[export]`.") from error
        check = check_export(plain, engine, shapes)
        if not check.difference <= TOLERANCE:
            raise ValueError(
                f"The outputs of the exported model differ by {check.difference:.1e} of the largest; at most "
                f"{TOLERANCE:.0e} is allowed, so nothing was written."
            )
        processor.save_pretrained(folder)
        if output.is_dir():
            output.rmdir()
        folder.rename(output)
    return check


__all__ = ["FORMATS", "ExportCheck", "export_model"]

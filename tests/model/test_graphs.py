"""Compiled and exported models give the same outputs as the original, at every image size."""

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import flatten_outputs
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import config as inductor_config
from torch.export import Dim
from transformers import Dinov2Config, ResNetConfig
from transformers.utils import logging

from cbsa_hf import (
    CBSABackbone,
    CBSAConfig,
    CBSAForImageClassification,
    CBSAForSemanticSegmentation,
    CBSAModel,
    modeling_cbsa,
)


# One layer is enough, since all layers depend on the image size alike. The image is not a square.
TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 3, "patch_size": 8}
TINY |= {"image_size": (32, 48), "representatives_size": (2, 3), "decoder_num_layers": 1, "decoder_num_heads": 2}
TINY |= {"decoder_head_dim": 8, "decoder_representatives_size": 2}
DINOV2 = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=24, patch_size=8)
RESNET = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
CASES = [
    (CBSAModel, {"num_register_tokens": 2}),
    (CBSAModel, {"patch_embedding_type": "patchify", "attention_type": "mssa", "position_interpolation": "bilinear"}),
    (CBSAModel, {"patch_embedding_type": "linear", "attention_type": "softmax", "feed_forward_type": "mlp"}),
    (CBSAForImageClassification, {"pooled_tokens": "all_but_last"}),
    (CBSAForImageClassification, {"patch_embedding_type": "patchify", "attention_type": "tssa"}),
    (CBSAForImageClassification, {"patch_embedding_type": "linear", "attention_type": "agent"}),
    (CBSAForImageClassification, {"attention_type": "mita", "feed_forward_type": "odl"}),
    (CBSABackbone, {"out_features": ["stem", "stage1"]}),
    (CBSABackbone, {"patch_embedding_type": "patchify", "attention_type": "linear", "reshape_hidden_states": False}),
    (CBSABackbone, {"patch_embedding_type": "linear", "representatives_type": "learned", "num_register_tokens": 1}),
    (CBSAForSemanticSegmentation, {}),
    (CBSAForSemanticSegmentation, {"patch_embedding_type": "patchify", "decoder_type": "mssa"}),
    (CBSAForSemanticSegmentation, {"patch_embedding_type": "linear", "decoder_type": "softmax", "size_factor": False}),
    (CBSAForSemanticSegmentation, {"decoder_type": "linear", "decoder_skip": True}),
    (CBSAForSemanticSegmentation, {"backbone_config": DINOV2}),
    (CBSAForSemanticSegmentation, {"backbone_config": RESNET, "decoder_base_num_patches": 24}),
]
SHAPES = [(2, 3, 32, 48), (1, 3, 33, 47), (3, 3, 64, 24)]  # the training size, odd sides, a tall image


def name_case(case) -> str:
    values = [value if isinstance(value, str) else getattr(value, "model_type", key) for key, value in case[1].items()]
    return "-".join([case[0].__name__, *values])


EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=name_case)


def build(case):
    """The model, with random weights, so that a part that a graph leaves out shows; and options of its forward."""
    torch.manual_seed(0)
    model_class, changes = case
    model = model_class(CBSAConfig(**TINY | changes)).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("step_rep", "step_x", "running_var")):
                tensor.uniform_(0.5, 2)
            elif name.endswith(("running_mean", "bias", "position_embeddings", "cls_token", "class_embeddings")):
                tensor.normal_()
    takes_size = model_class in (CBSAModel, CBSAForImageClassification)
    return model, {"interpolate_pos_encoding": True} if takes_size else {}


@EVERY_CASE
def test_export_and_onnx(case, tmp_path):
    model, options = build(case)
    dynamic_shapes = {"pixel_values": {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}, **dict.fromkeys(options)}
    exported = torch.export.export(model, (torch.randn(2, 3, 43, 57),), options, dynamic_shapes=dynamic_shapes)
    torch.onnx.export(exported, dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    module = exported.module()
    for shape in SHAPES:
        pixel_values = torch.randn(shape)
        with torch.no_grad():
            expected = flatten_outputs(model(pixel_values, **options))
            torch.testing.assert_close(
                flatten_outputs(module(pixel_values, **options)), expected, rtol=1e-4, atol=1e-4
            )
        found = session.run(None, {"pixel_values": pixel_values.numpy()})
        for actual, tensor in zip(found, expected, strict=True):
            np.testing.assert_allclose(
                actual, tensor, rtol=2e-3, atol=2e-3
            )  # a mistake with the size changes values by about 1


@pytest.mark.parametrize("case", [CASES[i] for i in (0, 4, 8, 10)], ids=name_case)
@inductor_config.patch(
    {"cpp.simdlen": 1}
)  # no vector instructions: `ATEN_CPU_CAPABILITY=default` has no headers for them
def test_inductor_compiles_one_graph_for_all_sizes(case):
    """
    The second size compiles a graph for any size. Sizes that fill whole patches need no padding, and may get their own
    graph. Later sizes compile nothing. There is one case for each class.
    """
    torch.compiler.reset()
    model, options = build(case)
    inductor = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, backend=inductor, fullgraph=True)
    graphs = []
    for shape in [(2, 3, 40, 56), (3, 3, 33, 47), (4, 3, 64, 24), (2, 3, 51, 29)]:
        pixel_values = torch.randn(shape)
        with torch.no_grad():
            actual, expected = (flatten_outputs(network(pixel_values, **options)) for network in (compiled, model))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        graphs.append(inductor.frame_count)
    assert graphs[3] == graphs[2] <= 3


@pytest.fixture
def warnings_once(monkeypatch):
    """The messages of `warning_once`, whose cache is cleared before and after the test."""
    messages = []
    logging.get_logger().warning_once.cache_clear()
    monkeypatch.setattr(modeling_cbsa.logger, "warning", lambda message, *args, **kwargs: messages.append(message))
    yield messages
    logging.get_logger().warning_once.cache_clear()


class Tuples(torch.nn.Module):
    """A model that returns a tuple of tensors, as `torch.jit.trace` needs."""

    def __init__(self, model, options):
        super().__init__()
        self.model, self.options = model, options
        self.eval()  # exporters set the model to the mode of this module

    def forward(self, pixel_values):
        return tuple(flatten_outputs(self.model(pixel_values, **self.options)))


@EVERY_CASE
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_tracing_warns_that_the_size_is_fixed(case, warnings_once):
    model, options = build(case)
    pixel_values = torch.randn(2, 3, 40, 56)
    with torch.no_grad():
        expected = flatten_outputs(model(pixel_values, **options))
        assert not warnings_once
        for _ in range(2):
            traced = torch.jit.trace(Tuples(model, options), pixel_values)
    torch.testing.assert_close(flatten_outputs(traced(pixel_values)), expected, rtol=1e-4, atol=1e-4)
    (message,) = warnings_once
    assert "images of this one size" in message and "`torch.export.export`" in message


@pytest.mark.parametrize("model_class", [CBSAForImageClassification, CBSAForSemanticSegmentation])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_old_onnx_exporter(tmp_path, warnings_once, model_class):
    """The bins of the pool do not divide the grid of 5 x 7 patches evenly."""
    model, options = build((model_class, {}))
    pixel_values = torch.randn(2, 3, 40, 56)
    torch.onnx.export(
        Tuples(model, options), (pixel_values,), tmp_path / "model.onnx", input_names=["x"], dynamo=False
    )
    assert len(warnings_once) == 1
    (found,) = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"x": pixel_values.numpy()})
    np.testing.assert_allclose(found, model(pixel_values, **options).logits.detach(), rtol=2e-3, atol=2e-3)

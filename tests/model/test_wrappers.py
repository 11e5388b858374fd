"""Models in wrappers: DataParallel, PEFT, `torch.compile`, half precision, and heads of Transformers."""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import flatten_outputs
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.parallel import replicate
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTConfig,
    DPTForDepthEstimation,
    ResNetConfig,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    ViTImageProcessorPil,
    VitPoseConfig,
)
from transformers.models.vitpose.modeling_vitpose import VitPoseClassicDecoder, VitPoseSimpleDecoder

from cbsa_hf import (
    CBSABackbone,
    CBSAConfig,
    CBSAForImageClassification,
    CBSAForSemanticSegmentation,
    CBSAModel,
    ContractAndBroadcastSelfAttention,
    SlidingWindowSegmenter,
    ZeroShotSegmenter,
)
from cbsa_hf.interpretability.attention_maps import attention_maps, exact_maps
from cbsa_hf.interpretability.measures import accuracy_under_noise, effective_rank, measure_layers
from cbsa_hf.interpretability.report import inspect_photo
from cbsa_hf.segmentation.inference import unwrap
from cbsa_hf.segmentation.patch_grouping import METHODS


FOREIGN = {
    "dinov2": Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=8),
    "resnet": ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
}
CLASSES = [
    CBSAModel,
    CBSAForImageClassification,
    CBSABackbone,
    *(pytest.param(CBSAForSemanticSegmentation, name, id=f"CBSAForSemanticSegmentation-{name}") for name in FOREIGN),
    CBSAForSemanticSegmentation,
]
EVERY_CLASS = pytest.mark.parametrize(
    ("model_class", "backbone"),
    [(c, None) if isinstance(c, type) else c for c in CLASSES],
)


def build(config: CBSAConfig, model_class: type, backbone: str | None, **values):
    torch.manual_seed(0)
    values |= {"decoder_representatives_size": 2, "out_features": None, "out_indices": None}
    if backbone is not None:
        values["backbone_config"] = FOREIGN[backbone]
    return model_class(CBSAConfig(**config.to_dict() | values)).eval()


@pytest.fixture
def make_replicas(monkeypatch):
    """`torch.nn.parallel.replicate` on the CPU. As on GPUs, replicas hold copies of the weights, no parameters."""

    def copy_to_devices(tensors, devices, detach=False):
        return [[tensor.detach() if detach else tensor.clone() for tensor in tensors] for _ in devices]

    module = sys.modules["torch.nn.parallel.replicate"]
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", copy_to_devices)
    monkeypatch.setattr(module, "_get_device_index", lambda device, optional: device)
    return lambda network: replicate(network, [0, 1])


@EVERY_CLASS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_data_parallel(tiny_config, make_replicas, model_class, backbone, dtype):
    """Two replicas in two threads give the outputs of the model, although they are called before it."""
    model = build(tiny_config, model_class, backbone).to(dtype)
    names = ("hidden_states", "attentions", "representative_attentions", "decoder_attentions")
    if model_class is not CBSAForSemanticSegmentation:
        names = names[:3]
    if model_class is CBSABackbone:
        names = names[:2]
    elif backbone is not None:
        names = ("hidden_states", "decoder_attentions")
    options = {f"output_{name}": True for name in names}
    shares = torch.randn(2, 2, 3, 32, 48)
    replicas = make_replicas(model)
    assert not list(replicas[0].parameters())
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda replica, share: replica(share, **options), replicas, shares))
    for outputs, share in zip(found, shares, strict=True):
        expected = model(share, **options)
        assert list(outputs) == list(expected)
        torch.testing.assert_close(flatten_outputs(outputs), flatten_outputs(expected), rtol=0, atol=0)
    flatten_outputs(found[0])[0].float().sum().backward()
    assert sum(parameter.grad is not None for parameter in model.parameters()) > 5


def test_data_parallel_trains(tiny_model, make_replicas):
    """Losses and gradients are those of the model. Replicas of a frozen encoder keep its statistics."""
    model = tiny_model.train()
    pixel_values, labels = torch.randn(2, 2, 3, 32, 48), torch.tensor([[0, 1], [2, 3]])
    replicas = make_replicas(model)
    losses = [replica(*batch).loss for replica, *batch in zip(replicas, pixel_values, labels, strict=True)]
    sum(losses).backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    expected = [model(*batch).loss for batch in zip(pixel_values, labels, strict=True)]
    torch.testing.assert_close(losses, expected)
    sum(expected).backward()
    torch.testing.assert_close(found, [parameter.grad for parameter in model.parameters()])

    model.cbsa.requires_grad_(False)
    before = [buffer.clone() for buffer in model.buffers()]
    for replica in make_replicas(model):
        replica(pixel_values[0])
        torch.testing.assert_close(list(replica.buffers()), before, rtol=0, atol=0)


@EVERY_CLASS
@pytest.mark.parametrize("by", ["config", "keyword"])
def test_return_dict_false(tiny_config, model_class, backbone, by):
    """`return_dict=False`, as a keyword or in the configuration."""
    model = build(tiny_config, model_class, backbone)
    pixel_values = torch.randn(2, 3, 32, 48)
    names = ["hidden_states"] if model_class is CBSABackbone or backbone else ["hidden_states", "attentions"]
    options = {f"output_{name}": True for name in names}
    expected = model(pixel_values, **options)
    if by == "config":
        model.config.return_dict = False
        outputs = model(pixel_values, **options)
    else:
        outputs = model(pixel_values, **options, return_dict=False)
    assert isinstance(outputs, tuple)
    torch.testing.assert_close(flatten_outputs(outputs), flatten_outputs(expected), rtol=0, atol=0)
    assert isinstance(model(pixel_values, return_dict=True), dict)


WRAPPERS = ("plain", "peft", "parameters", "compiled", "data_parallel", "all")


def wrap(model: nn.Module, name: str, head: str = "classifier") -> nn.Module:
    if name in ("peft", "all"):
        targets = {"target_modules": ["proj", "out_proj"], "modules_to_save": [head]}
        model = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **targets))
    elif name == "parameters":
        targets = ["feed_forward.weight", "attention.step_x"]
        model = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, target_parameters=targets))
    if name in ("compiled", "all"):
        model = torch.compile(model, backend="eager")
    return nn.DataParallel(model) if name in ("data_parallel", "all") else model


@pytest.mark.parametrize("name", WRAPPERS)
def test_maps_and_measures_of_wrapped_models(tiny_model, photo, name):
    """Maps and measures are of what the wrapped model computes, adapters included, also in training mode."""
    torch.manual_seed(0)
    pixel_values = torch.randn(2, 3, 40, 56)
    model = wrap(tiny_model, name).eval()
    with torch.no_grad():
        outputs = model(
            pixel_values, interpolate_pos_encoding=True, output_attentions=True, output_representative_attentions=True
        )
    steps = []
    operators = [module for module in model.modules() if isinstance(module, ContractAndBroadcastSelfAttention)]
    handles = [o.register_forward_hook(lambda o, args, output: steps.append(output[0])) for o in operators]
    with torch.no_grad():
        model(pixel_values, interpolate_pos_encoding=True)
    for handle in handles:
        handle.remove()
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    rows = torch.stack([token_map[:, :, 0, 1:] for token_map in outputs.attentions])
    torch.testing.assert_close(attention_maps(model, pixel_values), rows.unflatten(-1, (5, 7)))
    for operator, update, found in zip(operators, steps, exact_maps(model, pixel_values), strict=True):
        with torch.no_grad():
            torch.testing.assert_close(operator.merge_heads(found.update()), update, rtol=1e-4, atol=1e-4)
    attentions = torch.stack([f.double() for f in outputs.representative_attentions], dim=1)
    torch.testing.assert_close(
        measure_layers(model, [pixel_values]).representative_attention_rank,
        effective_rank(attentions),
        rtol=1e-4,
        atol=1e-4,
    )
    labels = outputs.logits.argmax(-1)
    assert accuracy_under_noise(model, [(pixel_values, labels)], [0.0]) == [1.0]
    processor = ViTImageProcessorPil(size={"height": 32, "width": 48})
    for method in METHODS:
        found = ZeroShotSegmenter(model, processor, method, long_side=48, min_probability=0)(photo)
        assert all(segment.name is not None for segment in found.segments)
    report = inspect_photo(photo, model, processor, long_side=48)
    assert len(report.numbers["predictions"]) == 5

    assert all(module.training for module in unwrap(model).modules())
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("name", ["peft", "compiled", "data_parallel", "all"])
def test_sliding_window_of_wrapped_models(tiny_segmenter, photo, name):
    """The classes are those of the wrapped model on the whole image, also in training mode."""
    processor = ViTImageProcessorPil(size={"height": 64, "width": 96})
    model = wrap(tiny_segmenter, name, head="decoder")
    photo = photo.resize((96, 64))
    pixel_values = processor(photo, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = model.eval()(pixel_values).logits[0]
    labels = SlidingWindowSegmenter(model.train(), processor)(photo)
    chosen = logits.gather(0, torch.from_numpy(labels).long()[None])[0]
    assert (logits.amax(0) - chosen).max() < 1e-4
    assert len(np.unique(labels)) > 1
    assert unwrap(model).training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_maps_and_segments_in_half_precision(tiny_model, tiny_segmenter, photo, dtype):
    processor = ViTImageProcessorPil(size={"height": 32, "width": 48})
    model = tiny_model.to(dtype)
    pixel_values = torch.randn(1, 3, 32, 48)
    assert attention_maps(model, pixel_values).dtype == torch.float32
    assert {found.writes.dtype for found in exact_maps(model, pixel_values)} == {torch.float32}
    inspect_photo(photo, model, processor, long_side=48)
    for method in METHODS:
        ZeroShotSegmenter(model, processor, method, long_side=48)(photo)
    segformer = SegformerForSemanticSegmentation(
        SegformerConfig(
            hidden_sizes=[8, 8, 8, 8],
            depths=[1, 1, 1, 1],
            num_attention_heads=[1, 1, 1, 1],
            decoder_hidden_size=8,
            num_labels=3,
        )
    )
    for segmenter in (tiny_segmenter, segformer):
        labels = SlidingWindowSegmenter(segmenter.to(dtype), processor)(photo)
        assert labels.shape == (photo.height, photo.width)


def test_measuring_while_another_thread_trains(tiny_model):
    """Measuring in other threads never changes the mode of a model in training."""
    model = tiny_model.train()
    pixel_values = torch.randn(1, 3, 32, 48)
    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(measure_layers, model, [pixel_values]) for _ in range(6)]
        while not all(job.done() for job in jobs):
            assert all(module.training for module in model.modules())
        [job.result() for job in jobs]
    assert all(module.training for module in model.modules())


def test_tokens_of_a_backbone():
    """`reshape_hidden_states=False` gives tokens, CLS first. The other tokens are the feature maps."""
    torch.manual_seed(0)
    values = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "image_size": 32}
    values = {"hidden_size": 24, "num_attention_heads": 2, "patch_size": 8, "representatives_size": 2, **values}
    maps = CBSABackbone(CBSAConfig(**values)).eval()
    tokens = CBSABackbone(CBSAConfig(**values, reshape_hidden_states=False)).eval()
    tokens.load_state_dict(maps.state_dict())
    pixel_values = torch.randn(2, 3, 33, 47)
    found = tokens(pixel_values).feature_maps
    assert [f.shape for f in found] == [(2, 1 + 5 * 6, 24)] * 4
    for feature_map, hidden_states in zip(maps(pixel_values).feature_maps, found, strict=True):
        torch.testing.assert_close(hidden_states[:, 1:].mT.unflatten(2, (5, 6)), feature_map)


@pytest.mark.parametrize(
    ("size", "patch_embedding"), [((32, 32), "conv_stem"), ((48, 32), "conv_stem"), ((33, 47), "linear")]
)
def test_depth_heads_on_tokens(size, patch_embedding):
    """
    DPT and DepthAnything give depths of the same size as with Dinov2. They count whole patches, as patch embeddings do
    that leave out the rest of an image.
    """
    torch.manual_seed(0)
    values = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "image_size": 32, "reshape_hidden_states": False}
    values = {"hidden_size": 24, "num_attention_heads": 2, "patch_size": 8, **values}
    neck = {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8, "reassemble_factors": [4, 2, 1, 0.5]}
    depth_anything = {"reassemble_hidden_size": 24, "head_hidden_size": 8, "patch_size": 8}
    pixel_values = torch.randn(2, 3, *size)
    shapes, depths = [], []
    for backbone in (
        Dinov2Config(**values),
        CBSAConfig(**values, patch_embedding_type=patch_embedding, representatives_size=2),
    ):
        dpt = DPTForDepthEstimation(DPTConfig(backbone_config=backbone, **neck)).eval()
        config = DepthAnythingConfig(backbone_config=backbone, **neck, **depth_anything)
        # DPT's neck takes the grid for a square, so it runs on square images only.
        models = [DepthAnythingForDepthEstimation(config).eval(), *([dpt] if size[0] == size[1] else [])]
        depths = [model(pixel_values).predicted_depth for model in models]
        assert all(depth.isfinite().all() for depth in depths)
        shapes.append([depth.shape for depth in depths])
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("use_simple_decoder", [True, False])
def test_pose_heads_on_maps(use_simple_decoder):
    """
    The heads of VitPose take feature maps. `VitPoseForPoseEstimation` itself takes tokens without CLS and a pair as
    `patch_size`, so it runs on its own backbone only, not even on Dinov2.
    """
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8}
    backbone = CBSABackbone(CBSAConfig(**sizes, image_size=(32, 24), representatives_size=2)).eval()
    config = VitPoseConfig(backbone_config=backbone.config, num_labels=4, use_simple_decoder=use_simple_decoder)
    head = (VitPoseSimpleDecoder if use_simple_decoder else VitPoseClassicDecoder)(config).eval()
    for height, width in [(32, 24), (33, 47)]:
        heatmaps = head(backbone(torch.randn(2, 3, height, width)).feature_maps[-1])
        assert heatmaps.shape == (2, 4, 4 * -(-height // 8), 4 * -(-width // 8))


def test_backbone_from_a_segmenter(tiny_segmenter, saved_segmenter):
    """A backbone loaded from the folder of a segmenter gives the features of its encoder, at every image size."""
    backbone = CBSABackbone.from_pretrained(saved_segmenter).eval()
    for height, width in [(32, 48), (33, 47), (64, 24)]:
        pixel_values = torch.randn(2, 3, height, width)
        tokens = tiny_segmenter.cbsa(pixel_values, interpolate_pos_encoding=True).last_hidden_state
        (feature_map,) = backbone(pixel_values).feature_maps
        assert feature_map.shape == (2, 24, -(-height // 8), -(-width // 8))
        torch.testing.assert_close(feature_map.flatten(2).mT, tokens[:, 1:])

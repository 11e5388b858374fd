"""Models as people wrap them: in the replicas of DataParallel, in adapters of PEFT, compiled, in half precision."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn.parallel import replicate
from transformers import Dinov2Config, ResNetConfig

from cbsa_hf import CBSABackbone, CBSAConfig, CBSAForImageClassification, CBSAForSemanticSegmentation, CBSAModel


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


def flatten(outputs) -> list[torch.Tensor]:
    """All tensors of a model's outputs, however nested."""
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    values = outputs.values() if isinstance(outputs, dict) else outputs
    return [tensor for value in values if value is not None for tensor in flatten(value)]


@pytest.fixture
def make_replicas(monkeypatch):
    """`torch.nn.parallel.replicate`, which is for GPUs, on the CPU: weights are copies, and no parameters."""

    def copy_to_devices(tensors, devices, detach=False):
        return [[tensor.detach() if detach else tensor.clone() for tensor in tensors] for _ in devices]

    module = sys.modules["torch.nn.parallel.replicate"]
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", copy_to_devices)
    monkeypatch.setattr(module, "_get_device_index", lambda device, optional: device)
    return lambda network: replicate(network, [0, 1])


@EVERY_CLASS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_data_parallel(tiny_config, make_replicas, model_class, backbone, dtype):
    """Two replicas in two threads, which are asked for outputs before the model itself is, give what it gives."""
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
        torch.testing.assert_close(flatten(outputs), flatten(expected), rtol=0, atol=0)
    (found[0][0] if isinstance(found[0][0], torch.Tensor) else found[0][0][-1]).float().sum().backward()
    assert sum(parameter.grad is not None for parameter in model.parameters()) > 5


def test_data_parallel_trains(tiny_model, make_replicas):
    """Losses, gradients and the running statistics, of which DataParallel keeps those of the first replica."""
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
def test_tuples(tiny_config, model_class, backbone, by):
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
    torch.testing.assert_close(flatten(outputs), flatten(expected), rtol=0, atol=0)
    assert isinstance(model(pixel_values, return_dict=True), dict)

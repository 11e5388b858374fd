"""Semantic segmentation: the decoders, the whole model, and its use with Transformers."""

import numpy as np
import pytest
import torch
from conftest import enable_activation_checkpointing, patches_of_bins, randomise
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from scipy.special import softmax
from torch.nn import functional as F
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForSemanticSegmentation,
    Dinov2Config,
    ResNetConfig,
    SegformerImageProcessorPil,
    SwinConfig,
    Trainer,
    TrainingArguments,
    pipeline,
)

from cbsa_hf import CBSAConfig, CBSAForSemanticSegmentation, CBSAModel, SlidingWindowSegmenter
from cbsa_hf.mask_decoder_cbsa import DECODERS


def make_model(config: CBSAConfig, **values) -> CBSAForSemanticSegmentation:
    values = {"decoder_num_layers": 2, "decoder_head_dim": 7, "decoder_representatives_size": (2, 3)} | values
    return randomise(CBSAForSemanticSegmentation(CBSAConfig(**config.to_dict() | values)))


def layer_norm(x: np.ndarray, weights: dict[str, np.ndarray], name: str) -> np.ndarray:
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x: np.ndarray, weights: dict[str, np.ndarray], name: str) -> np.ndarray:
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)


def attend(z: np.ndarray, weights: dict[str, np.ndarray], name: str, kind: str, grid: tuple[int, int]):
    """Update (tokens, d) and token-to-token map (heads, tokens, tokens), head by head and bin by bin."""
    heads, p = 3, 7
    updates, maps = [], []
    for h in range(heads):
        part = slice(h * p, (h + 1) * p)
        if kind == "softmax":
            q, k, v = (linear(z, weights, f"{name}.{letter}_proj")[:, part] for letter in "qkv")
            maps.append(softmax(q @ k.T / p**0.5, 1))
            updates.append(maps[-1] @ v)
            continue
        W = linear(z, weights, f"{name}.proj")[:, part]
        if kind == "mssa":
            maps.append(softmax(W @ W.T / p**0.5, 1))
            updates.append(maps[-1] @ W)
            continue
        Q = np.stack([W[patches].mean(0) for patches in patches_of_bins(grid, (2, 3))])
        A = softmax(Q @ W.T / p**0.5, 1)
        Q = Q + weights[f"{name}.step_rep"][h] * (A @ W)
        C = softmax(Q @ Q.T / p**0.5, 1) @ Q
        maps.append(A.T @ A)
        size_factor = len(W) / (4 * 6 + 5)  # tokens, over those at `image_size`: 4 x 6 patches and 5 classes
        updates.append(weights[f"{name}.step_x"][h] * size_factor * (A.T @ C))
    return linear(np.concatenate(updates, 1), weights, f"{name}.out_proj"), np.stack(maps)


def gelu(x: np.ndarray) -> np.ndarray:
    return x * torch.special.ndtr(torch.from_numpy(x)).numpy()


@pytest.mark.parametrize("kind", ["cbsa", "mssa", "softmax"])
@pytest.mark.parametrize("grid", [(4, 6), (5, 3)])
def test_decoder_by_its_formulas(tiny_config, kind, grid):
    decoder = make_model(tiny_config, decoder_type=kind).decoder.double()
    weights = {name: tensor.numpy() for name, tensor in decoder.state_dict().items()}
    patches = torch.randn(1, grid[0] * grid[1], 24, dtype=torch.float64)
    masks, attentions = decoder(patches, grid, output_attentions=True)

    num_patches = grid[0] * grid[1]
    x = linear(patches[0].numpy(), weights, "input_proj") if kind == "softmax" else patches[0].numpy()
    x = np.concatenate([x, weights["class_embeddings"][0]])
    for i, (reads, writes) in enumerate(attentions):
        update, token_map = attend(
            layer_norm(x, weights, f"layers.{i}.layernorm_before"), weights, f"layers.{i}.attention", kind, grid
        )
        x = x + update
        if kind == "softmax":
            normalised = layer_norm(x, weights, f"layers.{i}.layernorm_after")
            hidden = gelu(linear(normalised, weights, f"layers.{i}.feed_forward.fc1"))
            x = x + linear(hidden, weights, f"layers.{i}.feed_forward.fc2")
        assert reads.shape == writes.shape == (1, 3, 5, *grid)
        np.testing.assert_allclose(reads[0].flatten(2).detach(), token_map[:, num_patches:, :num_patches])
        np.testing.assert_allclose(
            writes[0].flatten(2).detach(), token_map[:, :num_patches, num_patches:].transpose(0, 2, 1)
        )
    x = layer_norm(x, weights, "layernorm")
    patches, classes = x[:num_patches], x[num_patches:]
    if kind == "softmax":
        patches, classes = linear(patches, weights, "patch_proj"), linear(classes, weights, "class_proj")
    cosines = patches @ classes.T / np.linalg.norm(patches, axis=1)[:, None] / np.linalg.norm(classes, axis=1)
    expected = layer_norm(cosines, weights, "mask_norm")
    np.testing.assert_allclose(masks[0].detach(), expected.T.reshape(5, *grid))


def test_class_maps_need_no_token_map(tiny_config):
    """The decoder of CBT takes them from the attention of its representatives, in linear time."""
    model = make_model(tiny_config)
    built = []
    for layer in model.decoder.layers:
        layer.attention.register_forward_hook(lambda module, args, output: built.append(output[1] is not None))
    model(torch.randn(1, 3, 32, 48), output_decoder_attentions=True)
    assert built == [False] * 2


@pytest.mark.parametrize("decoder", DECODERS)
def test_loss_and_gradients(tiny_config, decoder):
    model = make_model(tiny_config, decoder_type=decoder).train()
    labels = torch.randint(0, 5, (2, 33, 47))
    labels[0, :20] = 255
    outputs = model(torch.randn(2, 3, 33, 47), labels=labels)
    expected = [
        -outputs.logits[b, :, i, j].log_softmax(0)[labels[b, i, j]] for b, i, j in (labels != 255).nonzero().tolist()
    ]
    torch.testing.assert_close(outputs.loss, torch.stack(expected).mean())
    outputs.loss.backward()
    for name, parameter in model.named_parameters():
        if not name.endswith("k_proj.bias"):  # has no gradient, since softmax ignores it
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert model(torch.randn(2, 3, 33, 47), labels=torch.full_like(labels, 255)).loss == 0


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("patch_embedding", ["conv_stem", "linear"])
@pytest.mark.parametrize("size", [(32, 48), (33, 47), (8, 8), (5, 70)])
def test_images_of_any_size(tiny_config, decoder, patch_embedding, size):
    model = make_model(tiny_config, decoder_type=decoder, patch_embedding_type=patch_embedding)
    pixel_values = torch.randn(2, 3, *size)
    with torch.no_grad():
        logits = model(pixel_values).logits
        height, width = (-(-side // 8) * 8 for side in size)
        padded = torch.zeros(2, 3, height, width)
        padded[:, :, : size[0], : size[1]] = pixel_values
        tokens = model.cbsa(padded, interpolate_pos_encoding=True).last_hidden_state[:, 1:]
        masks, _ = model.decoder(tokens, (height // 8, width // 8))
    masks = F.interpolate(masks, size=(height, width), mode="bilinear", align_corners=False)
    torch.testing.assert_close(logits, masks[:, :, : size[0], : size[1]])


def convolve(x: torch.Tensor, convolution: torch.nn.Conv2d) -> torch.Tensor:
    """A convolution as a product: each column of `unfold` has the values under the kernel at one place."""
    height, width = ((n - 1) // convolution.stride[0] + 1 for n in x.shape[2:])
    columns = F.unfold(x, convolution.kernel_size, padding=convolution.padding, stride=convolution.stride)
    bias = 0 if convolution.bias is None else convolution.bias[:, None]
    return (convolution.weight.flatten(1) @ columns + bias).unflatten(2, (height, width))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("size", [(32, 48), (33, 47)])
def test_skip_by_its_formula(tiny_config, decoder, size):
    model = make_model(tiny_config, decoder_type=decoder, decoder_skip=True).double()
    pixel_values = torch.randn(2, 3, *size, dtype=torch.float64)
    height, width = (-(-side // 8) * 8 for side in size)
    padded = torch.zeros(2, 3, height, width, dtype=torch.float64)
    padded[:, :, : size[0], : size[1]] = pixel_values
    x, stem_maps = padded, []
    layers = iter(model.cbsa.embeddings.patch_embeddings.layers)
    for convolution, norm, activation in zip(*[layers] * 3, strict=False):  # the last convolution has no activation
        x = convolve(x, convolution)
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        x = activation((x - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None])
        stem_maps.append(x)
    assert [tuple(stem_map.shape[1:]) for stem_map in stem_maps] == [
        (6, height // 2, width // 2),
        (12, height // 4, width // 4),
    ]

    tokens = model.cbsa(padded, interpolate_pos_encoding=True).last_hidden_state[:, 1:]
    masks, _ = model.decoder(tokens, (height // 8, width // 8))
    skip = model.decoder_skip
    x = tokens.mT.reshape(2, 24, height // 8, width // 8)
    for convolution, stem_map in zip(skip.convolutions[:2], [stem_maps[1], stem_maps[0]], strict=True):
        x = torch.nn.Upsample(scale_factor=2, mode="bilinear")(F.gelu(convolve(x, convolution))) + stem_map
    x = convolve(F.gelu(convolve(x, skip.convolutions[2])), skip.classifier)
    masks = torch.nn.Upsample(scale_factor=4, mode="bilinear")(masks) + x
    expected = torch.nn.Upsample(scale_factor=2, mode="bilinear")(masks)[:, :, : size[0], : size[1]]
    torch.testing.assert_close(model(pixel_values).logits, expected, rtol=1e-9, atol=1e-9)


def test_skip_begins_with_the_masks_of_a_trained_segmenter(tiny_segmenter, saved_segmenter):
    pixel_values = torch.randn(1, 3, 32, 48)
    model = CBSAForSemanticSegmentation.from_pretrained(saved_segmenter, decoder_skip=True).eval()
    tokens = model.cbsa(pixel_values).last_hidden_state[:, 1:]
    masks, _ = tiny_segmenter.decoder(tokens, (4, 6))
    for size in [(16, 24), (32, 48)]:  # to the finest map of the stem, then to the image
        masks = F.interpolate(masks, size=size, mode="bilinear")
    torch.testing.assert_close(model(pixel_values).logits, masks)
    model.train()(pixel_values, labels=torch.randint(0, 5, (1, 32, 48))).loss.backward()
    assert model.decoder_skip.classifier.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_skip_sees_whole_maps_of_large_images(tiny_config):
    """A large image passes the stem in strips, but not if the maps of the stem are needed."""
    model = make_model(tiny_config, decoder_type="linear", decoder_skip=True)
    pixel_values = torch.randn(1, 3, 1024, 1025)
    in_inference = model(pixel_values).logits
    with torch.enable_grad():
        in_training = model(pixel_values).logits
    torch.testing.assert_close(in_inference, in_training, rtol=1e-4, atol=1e-4)


def test_outputs_on_request(tiny_config):
    model = make_model(tiny_config)
    pixel_values = torch.randn(2, 3, 30, 48)
    names = ("hidden_states", "attentions", "representative_attentions", "decoder_attentions")
    plain = model(pixel_values)
    assert list(plain) == ["logits"]
    outputs = model(pixel_values, **{f"output_{name}": True for name in names})
    torch.testing.assert_close(outputs.logits, plain.logits)
    assert [h.shape for h in outputs.hidden_states] == [(2, 25, 24)] * 4
    assert [a.shape for a in outputs.attentions] == [(2, 2, 25, 25)] * 3
    assert [a.shape for a in outputs.representative_attentions] == [(2, 2, 6, 25)] * 3
    assert [[a.shape for a in pair] for pair in outputs.decoder_attentions] == [[(2, 3, 5, 4, 6)] * 2] * 2
    for name in names:
        setattr(model.config, f"output_{name}", True)
    assert set(model(pixel_values)) == {"logits", *names}
    assert isinstance(model(pixel_values, return_dict=False), tuple)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_positions_are_interpolated_as_configured(tiny_config, mode):
    embeddings = make_model(tiny_config, position_interpolation=mode).cbsa.embeddings
    patches = embeddings.position_embeddings[0, 1:].T.reshape(1, 24, 4, 6)
    expected = F.interpolate(patches, size=(3, 9), mode=mode).reshape(24, 27).T
    torch.testing.assert_close(torch.cat(embeddings.interpolate_pos_encoding((3, 9)), dim=1)[0, 1:], expected)


BACKBONES = {
    "dinov2": (Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28), (42, 56), 14),
    "swin": (
        SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2, image_size=32, out_indices=[1, 2]),
        (36, 48),
        8,
    ),
    "resnet": (ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]), (33, 47), 8),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_other_backbones(name, tmp_path):
    backbone_config, padded_size, stride = BACKBONES[name]
    config = CBSAConfig(num_labels=5, decoder_representatives_size=2, backbone_config=backbone_config)
    torch.manual_seed(0)
    model = CBSAForSemanticSegmentation(config)
    pixel_values = torch.randn(2, 3, 33, 47)
    outputs = model(pixel_values, labels=torch.randint(0, 5, (2, 33, 47)))
    outputs.loss.backward()
    first = next(parameter for parameter in model.backbone.parameters() if parameter.ndim == 4)
    assert first.grad.abs().sum() > 0

    model.eval()
    names = ("hidden_states", "decoder_attentions")
    outputs = model(pixel_values, **{f"output_{name}": True for name in names})
    padded = F.pad(pixel_values, (0, padded_size[1] - 47, 0, padded_size[0] - 33))
    with torch.no_grad():
        feature_map = model.backbone(padded).feature_maps[-1]
        masks, _ = model.decoder(feature_map.flatten(2).mT, feature_map.shape[2:])
    grid = tuple(-(-side // stride) for side in padded_size)
    assert outputs.decoder_attentions[0][0].shape == (2, 3, 5, *grid)
    assert len(outputs.hidden_states) >= 3
    masks = F.interpolate(masks, size=padded_size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(outputs.logits, masks[:, :, :33, :47])

    model.save_pretrained(tmp_path)
    loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
    assert type(loaded.config.backbone_config) is type(backbone_config)
    torch.testing.assert_close(loaded(pixel_values).logits, outputs.logits)
    with pytest.raises(ValueError, match=f"a segmenter with a backbone of type '{name}', not with a CBSA encoder"):
        CBSAModel(config)
    with pytest.raises(ValueError, match=f"A backbone of type '{name}' has no `representative_attentions`"):
        model(pixel_values, output_representative_attentions=True)


def test_frozen_backbone():
    """While a backbone of Transformers is frozen, its batch norm statistics do not change."""
    config = CBSAConfig(num_labels=5, decoder_type="linear", backbone_config=BACKBONES["resnet"][0])
    model = CBSAForSemanticSegmentation(config).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert any(name.endswith("running_mean") for name in before)
    model.backbone.requires_grad_(False)
    model(torch.randn(2, 3, 33, 47)).logits.sum().backward()
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
    model.backbone.requires_grad_(True)
    model(torch.randn(2, 3, 33, 47))
    assert all(not torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


def test_encoder_of_a_classifier(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "classifier")
    torch.manual_seed(0)
    model, report = CBSAForSemanticSegmentation.from_pretrained(
        tmp_path / "classifier", num_labels=7, decoder_type="softmax", output_loading_info=True
    )
    assert all(name.startswith("decoder.") for name in report["missing_keys"])
    assert set(report["unexpected_keys"]) == {"classifier.weight", "classifier.bias"}
    pixel_values = torch.randn(2, 3, 32, 48)
    expected = tiny_model.cbsa(pixel_values).last_hidden_state
    torch.testing.assert_close(model.cbsa(pixel_values).last_hidden_state, expected)
    assert model(pixel_values).logits.shape == (2, 7, 32, 48)
    assert model.decoder.class_embeddings.std() > 0

    # The other way round, `AutoModel` loads the encoder of the saved segmenter.
    model.save_pretrained(tmp_path / "segmenter")
    encoder = AutoModel.from_pretrained(tmp_path / "segmenter")
    torch.testing.assert_close(encoder(pixel_values).last_hidden_state, expected)
    again = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "segmenter")
    torch.testing.assert_close(again(pixel_values).logits, model(pixel_values).logits)


def test_gradient_checkpointing_changes_nothing(tiny_config):
    model = make_model(tiny_config).train()
    pixel_values, labels = torch.randn(2, 3, 32, 48), torch.randint(0, 5, (2, 32, 48))

    def gradients():
        model.zero_grad()
        model(pixel_values, labels=labels).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    enable_activation_checkpointing(model)
    for a, b in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("decoder", DECODERS)
def test_compiles_without_graph_breaks(tiny_config, decoder):
    torch.compiler.reset()
    model = make_model(tiny_config, decoder_type=decoder)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    pixel_values = torch.randn(2, 3, 33, 47)
    wanted = {"output_decoder_attentions": True} if decoder != "linear" else {}
    expected, outputs = model(pixel_values, **wanted), compiled(pixel_values, **wanted)
    # A graph computes ISTA in another order, see `CBSAISTA`.
    torch.testing.assert_close(outputs.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs.decoder_attentions, expected.decoder_attentions, rtol=1e-4, atol=1e-4)


def test_half_precision(tiny_segmenter, saved_segmenter):
    """A LayerNorm makes logits of size 1. In bfloat16 they differ from float32 by at most 0.2."""
    model = CBSAForSemanticSegmentation.from_pretrained(saved_segmenter, dtype=torch.bfloat16)
    pixel_values, labels = torch.randn(1, 3, 33, 47), torch.randint(0, 5, (1, 33, 47))
    outputs, expected = model(pixel_values, labels=labels), tiny_segmenter(pixel_values, labels=labels)
    assert (outputs.logits.dtype, outputs.loss.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(outputs.logits.float(), expected.logits, rtol=0, atol=0.2)
    torch.testing.assert_close(outputs.loss, expected.loss, rtol=0.05, atol=0)


def test_device_map(tiny_segmenter, saved_segmenter, tmp_path):
    model = CBSAForSemanticSegmentation.from_pretrained(
        saved_segmenter, device_map={"cbsa": "cpu", "decoder": "disk"}, offload_folder=tmp_path / "offload"
    )
    pixel_values = torch.randn(1, 3, 33, 47)
    torch.testing.assert_close(model(pixel_values).logits, tiny_segmenter(pixel_values).logits)


def test_trainer_learns(tiny_config, tmp_path):
    """The left part of an image is one class, and the brighter right part is another."""
    torch.manual_seed(0)
    data = []
    for i in range(16):
        labels = torch.zeros(32, 48, dtype=torch.long)
        labels[:, 16 + 8 * (i % 3) :] = 1
        data.append({"pixel_values": torch.randn(3, 32, 48) + 2 * labels, "labels": labels})
    config = CBSAConfig(**tiny_config.to_dict() | {"num_labels": 2, "decoder_representatives_size": 4})
    trainer = Trainer(
        CBSAForSemanticSegmentation(config),
        TrainingArguments(
            tmp_path,
            max_steps=30,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
        ),
        train_dataset=data,
    )
    assert not trainer.model_accepts_loss_kwargs
    trainer.train()
    predictions = trainer.predict(data)
    assert (predictions.predictions.argmax(1) == predictions.label_ids).mean() > 0.9


@pytest.mark.parametrize("reduce_labels", [False, True])
def test_processor_takes_image_and_mask(tiny_segmenter, saved_segmenter, noise, reduce_labels):
    processor = AutoImageProcessor.from_pretrained(saved_segmenter, do_reduce_labels=reduce_labels)
    assert isinstance(processor, SegformerImageProcessorPil)
    labels = np.random.default_rng(0).integers(0, 6, (50, 70)).astype(np.uint8)
    inputs = processor(noise.convert("RGBA"), segmentation_maps=Image.fromarray(labels), return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 32, 48)
    nearest = np.asarray(Image.fromarray(labels).resize((48, 32), Image.Resampling.NEAREST)).astype(int)
    expected = np.where(nearest == 0, 255, nearest - 1) if reduce_labels else nearest
    assert inputs["labels"].dtype == torch.long
    assert np.array_equal(inputs["labels"][0], expected)
    if reduce_labels:
        assert tiny_segmenter(**inputs).loss > 0


def test_post_processing_of_the_processor(tiny_segmenter, saved_segmenter, noise):
    processor = AutoImageProcessor.from_pretrained(saved_segmenter)
    outputs = tiny_segmenter(**processor([noise, noise.rotate(180)], return_tensors="pt"))
    sizes = [(50, 70), (9, 13)]
    segmentations = processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
    assert [tuple(segmentation.shape) for segmentation in segmentations] == sizes
    for logits, segmentation in zip(outputs.logits, segmentations, strict=True):
        resized = F.interpolate(logits[None], size=tuple(segmentation.shape), mode="bilinear")[0]
        assert torch.equal(segmentation, resized.argmax(0))
    plain = processor.post_process_semantic_segmentation(outputs)
    assert torch.equal(torch.stack(plain), outputs.logits.argmax(1))


def test_pipeline(tiny_segmenter, saved_segmenter, noise):
    processor = AutoImageProcessor.from_pretrained(saved_segmenter)
    outputs = tiny_segmenter(**processor(noise, return_tensors="pt"))
    (segmentation,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[(50, 70)])
    segments = pipeline("image-segmentation", model=str(saved_segmenter))(noise)
    assert len(segments) > 1
    for segment in segments:
        index = tiny_segmenter.config.label2id[segment["label"]]
        assert np.array_equal(np.asarray(segment["mask"]) == 255, segmentation == index)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"decoder_type": "mlp"}, "`decoder_type` is 'mlp'; choose one of 'cbsa', 'mssa', 'softmax', 'linear'"),
        ({"decoder_num_layers": 0}, "`decoder_num_layers` is 0, and has to be at least 1"),
        ({"decoder_head_dim": 0}, "`decoder_head_dim` is 0, and has to be at least 1"),
        ({"decoder_representatives_size": 0}, "`decoder_representatives_size` is 0; give one side or"),
        ({"position_interpolation": "nearest"}, "`position_interpolation` is 'nearest'; choose one of 'bicubic'"),
        ({"decoder_skip": True, "patch_embedding_type": "linear"}, "`decoder_skip=True` reads the maps of the conv"),
        ({"decoder_skip": True, "backbone_config": BACKBONES["dinov2"][0]}, "which this encoder does not have"),
        ({"backbone_config": {"hidden_size": 3}}, "`model_type` None, which Transformers does not know"),
        ({"backbone_config": CBSAConfig()}, "a CBSA encoder is described by this configuration itself"),
    ],
)
def test_bad_configuration_raises(values, message):
    with pytest.raises((StrictDataclassError, ValueError), match=message):
        CBSAConfig(**values)


def test_bad_input_raises(tiny_config):
    model = make_model(tiny_config, decoder_type="linear")
    with pytest.raises(ValueError, match=r"`labels` has the shape \(2, 16, 16\); the pixels take \(2, 32, 48\)"):
        model(torch.randn(2, 3, 32, 48), labels=torch.zeros(2, 16, 16, dtype=torch.long))
    with pytest.raises(ValueError, match="Decoder type 'linear' has no class tokens"):
        model(torch.randn(2, 3, 32, 48), output_decoder_attentions=True)
    with pytest.raises(ValueError, match="`num_labels` is 0; semantic segmentation takes one class or more"):
        make_model(tiny_config, num_labels=0, id2label=None)
    with pytest.raises(ValueError, match="`output_stem_maps=True` needs a configuration with `decoder_skip=True`"):
        model.cbsa(torch.randn(2, 3, 32, 48), output_stem_maps=True)


@pytest.mark.parametrize("decoder", DECODERS)
def test_one_class(tiny_config, decoder, noise):
    """The loss is binary cross-entropy over pixels that are not ignored, and the segmenter's threshold is 0.5."""
    model = make_model(tiny_config, decoder_type=decoder, num_labels=1, id2label=None)
    pixel_values = torch.randn(2, 3, 33, 47)
    labels = torch.randint(0, 2, (2, 33, 47))
    labels[0, :20] = 255
    outputs = model(pixel_values, labels=labels)
    assert outputs.logits.shape == (2, 1, 33, 47)
    probabilities = outputs.logits.double().sigmoid()[:, 0]
    chosen = torch.where(labels == 1, probabilities, 1 - probabilities)[labels != 255]
    torch.testing.assert_close(outputs.loss.double(), -chosen.log().mean(), rtol=1e-5, atol=1e-5)
    outputs.loss.backward()
    for name, parameter in model.named_parameters():
        if not name.endswith("k_proj.bias"):  # has no gradient, since softmax ignores it
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert model(pixel_values, labels=torch.full_like(labels, 255)).loss == 0

    processor = SegformerImageProcessorPil(size={"height": 32, "width": 48})
    pixels = processor(noise, do_resize=False, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = model(pixels).logits[0, 0]
        if decoder != "linear":
            model.decoder.mask_norm.bias -= logits.median()
        else:
            model.decoder.classifier.bias -= logits.median()
        expected = model(pixels).logits[0, 0].sigmoid() > 0.5
    found = SlidingWindowSegmenter(model, processor, window=(50, 70))(noise)
    assert found.dtype == np.uint8
    assert 0.4 < found.mean() < 0.6
    assert (found == expected.numpy()).mean() > 0.99

"""`cbsa convert`: converted checkpoints give the outputs of the library that they come from."""

import json
import re
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import REFERENCE, MakesFolder, assert_matches, randomise
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SegformerImageProcessorPil,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTModel,
)

from cbsa_hf import CBSAConfig, load_checkpoint
from cbsa_hf.cli import main
from cbsa_hf.conversion.convert import convert_state_dict, detect_origin
from cbsa_hf.conversion.originals import original_outputs


needs_reference = pytest.mark.skipif(not REFERENCE.is_dir(), reason=f"no recorded tensors at {REFERENCE.name}")

SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": 32,
    "patch_size": 8,
}


def convert(source, output, *options) -> int:
    return main(["convert", str(source), "-o", str(output), *map(str, options)])


@pytest.fixture
def vit() -> ViTForImageClassification:
    labels = {0: "cat", 1: "dog", 2: "newt"}
    return randomise(ViTForImageClassification(ViTConfig(**SIZES, layer_norm_eps=1e-3, id2label=labels)))


@pytest.fixture
def dinov2() -> Dinov2Model:
    return randomise(Dinov2Model(Dinov2Config(**SIZES, mlp_ratio=2)))


@pytest.fixture
def pixel_values() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def crate_alpha_weights(width=24, layers=2, patch=8, patches=16, labels=5) -> dict[str, torch.Tensor]:
    """Random tensors with the names and shapes of CRATE-alpha's checkpoints."""
    torch.manual_seed(0)
    shapes = {"conv1.weight": (width, 3, patch, patch), "conv1.bias": (width,), "cls_token": (1, 1, width)}
    shapes |= {"pos_embedding": (1, 1 + patches, width), "mlp_head.1.weight": (labels, width)}
    shapes |= {"mlp_head.1.bias": (labels,), "mlp_head.0.weight": (width,), "mlp_head.0.bias": (width,)}
    for i in range(layers):
        shapes |= {f"transformer.layers.{i}.{j}.norm.{kind}": (width,) for j in (0, 1) for kind in ("weight", "bias")}
        shapes |= {f"transformer.layers.{i}.0.fn.{name}.weight": (width, width) for name in ("qkv", "to_out.0")}
        shapes |= {f"transformer.layers.{i}.1.fn.{name}": (width, 4 * width) for name in ("D", "D1")}
    # Tokens are as small as the epsilons, so that these matter. The dictionary is so large that the code is not zero.
    large = re.compile(r"norm|mlp_head\.0|fn\.D$")
    return {name: torch.randn(shape) * (0.5 if large.search(name) else 0.003) for name, shape in shapes.items()}


def crate_alpha_logits(weights: dict[str, torch.Tensor], image: torch.Tensor, heads: int) -> torch.Tensor:
    """Logits of an image (3, height, width), by the formulas of the paper, token by token in float64."""
    weights = {name: tensor.double() for name, tensor in weights.items()}
    width, _, patch, _ = weights["conv1.weight"].shape

    def norm(x, name, eps):
        x = (x - x.mean()) / (x.var(correction=0) + eps).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    tokens = [weights["cls_token"][0, 0]]
    for y in range(0, image.shape[1], patch):
        for x in range(0, image.shape[2], patch):
            pixels = image[:, y : y + patch, x : x + patch].double()
            tokens.append((weights["conv1.weight"] * pixels).sum((1, 2, 3)) + weights["conv1.bias"])
    tokens = [token + position for token, position in zip(tokens, weights["pos_embedding"][0], strict=True)]
    for i in range(2):
        prefix, p = f"transformer.layers.{i}", width // heads
        w = [weights[f"{prefix}.0.fn.qkv.weight"] @ norm(token, f"{prefix}.0.norm", 1e-6) for token in tokens]
        updates = []
        for query in w:
            update = []
            for h in (slice(k * p, k * p + p) for k in range(heads)):
                shares = torch.stack([query[h] @ key[h] / p**0.5 for key in w]).softmax(0)
                update.append(sum(share * value[h] for share, value in zip(shares, w, strict=True)))
            updates.append(weights[f"{prefix}.0.fn.to_out.0.weight"] @ torch.cat(update))
        tokens = [token + update for token, update in zip(tokens, updates, strict=True)]
        D, D1 = weights[f"{prefix}.1.fn.D"], weights[f"{prefix}.1.fn.D1"]
        for n, token in enumerate(tokens):
            x = norm(token, f"{prefix}.1.norm", 1e-6)
            z1 = torch.relu(0.1 * D.T @ x - 0.1 * 0.1)
            z2 = torch.relu(z1 - 0.1 * D.T @ (D @ z1 - x) - 0.1 * 0.1)
            tokens[n] = token + D1 @ z2
    return weights["mlp_head.1.weight"] @ norm(tokens[0], "mlp_head.0", 1e-5) + weights["mlp_head.1.bias"]


def test_crate_alpha(pixel_values, tmp_path):
    weights = crate_alpha_weights()
    torch.save(weights, tmp_path / "crate_alpha_B16.pth")
    assert convert(tmp_path / "crate_alpha_B16.pth", tmp_path / "out", "--num-heads", 3) == 0
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    assert (model.config.feed_forward_type, model.config.attention_type) == ("odl", "mssa")
    with torch.no_grad():
        logits = model(pixel_values).logits
    expected = torch.stack([crate_alpha_logits(weights, image, heads=3) for image in pixel_values])
    assert_matches(logits.double(), expected)


def to_timm(model) -> dict[str, torch.Tensor]:
    """The weights of a ViT or DINOv2 of Transformers by the names that timm gives them."""
    weights = {}
    for name, tensor in model.state_dict().items():
        for theirs, timms in (
            (f"{model.base_model_prefix}.", ""),
            ("encoder.layer.", "layers."),
            ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
            ("embeddings.position_embeddings", "pos_embed"),
            ("embeddings.", ""),
            ("layernorm_before", "norm1"),
            ("layernorm_after", "norm2"),
            ("layernorm", "norm"),
            ("layers.", "blocks."),
            ("attention.o_proj", "attn.proj"),
            ("classifier", "head"),
            ("layer_scale1.lambda1", "ls1.gamma"),
            ("layer_scale2.lambda1", "ls2.gamma"),
        ):
            name = name.replace(theirs, timms)
        weights[name] = tensor
    for i in range(model.config.num_hidden_layers):
        for kind in ("weight", "bias"):
            parts = [weights.pop(f"blocks.{i}.attention.{letter}_proj.{kind}") for letter in "qkv"]
            weights[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    return weights


@needs_reference
@pytest.mark.parametrize(
    "name",
    [
        "cbt_patch16",
        "cbt_patch8",
        "cbt_patch16_224",
        "crate_conv_patch16",
        "crate_patchify_patch16",
        "tost_conv_patch16",
    ],
)
def test_recorded_classifiers(name, tmp_path, capsys):
    recording = REFERENCE / f"{name}.safetensors"
    assert convert(recording, tmp_path / name, "--num-heads", 3, "--verify", recording) == 0
    assert "logits: differs by" in capsys.readouterr().out
    tensors = load_file(recording)
    model, processor = load_checkpoint(str(tmp_path / name))
    with torch.no_grad():
        assert_matches(model(tensors["input.pixel_values"]).logits, tensors["output.logits"])
    assert processor.size["height"] == tensors["input.pixel_values"].shape[2]
    assert model.config.pooled_tokens == ("all_but_last" if name.startswith("cbt") else "patches")
    files = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
    assert files <= {path.name for path in (tmp_path / name).iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == "float32"
    assert json.loads((tmp_path / name / "preprocessor_config.json").read_text())["do_convert_rgb"] is True


@needs_reference
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("under", ["state_dict", "model", None])
def test_files_of_torch_save(prefix, under, tmp_path):
    tensors = load_file(REFERENCE / "cbt_patch8.safetensors")
    weights = {
        prefix + key.removeprefix("state_dict."): tensor
        for key, tensor in tensors.items()
        if key.startswith("state_dict.")
    }
    torch.save({under: weights, "epoch": 3} if under else weights, tmp_path / "best.pth.tar")
    assert convert(tmp_path / "best.pth.tar", tmp_path / "cbt") == 0  # the step sizes tell the number of heads
    with torch.no_grad():
        logits = load_checkpoint(str(tmp_path / "cbt"))[0](tensors["input.pixel_values"]).logits
    assert_matches(logits, tensors["output.logits"])


@needs_reference
def test_verify_refuses_other_outputs(tmp_path, capsys):
    recording = REFERENCE / "cbt_patch8.safetensors"
    tensors = load_file(recording)
    tensors["output.logits"][0, 0] += 1e-3 * tensors["output.logits"].abs().max()
    save_file(tensors, tmp_path / "other.safetensors")
    assert convert(recording, tmp_path / "cbt", "--verify", tmp_path / "other.safetensors") == 2
    assert "nothing was written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["other.safetensors"]


@pytest.mark.parametrize("layout", ["file", "memory"])
def test_vit(layout, vit, pixel_values, tmp_path):
    vit.save_pretrained(tmp_path / "vit")
    if layout == "memory":
        (tmp_path / "vit" / "model.safetensors").unlink()
        assert "vit.layers.0.attention.q_proj.weight" in vit.state_dict()
        torch.save(vit.state_dict(), tmp_path / "vit" / "pytorch_model.bin")
    ViTImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.25] * 3, resample=3).save_pretrained(tmp_path / "vit")
    assert convert(tmp_path / "vit", tmp_path / "out", "--license", "mit", "--attribution", "Made by chance.") == 0
    model, processor = load_checkpoint(str(tmp_path / "out"))
    with torch.no_grad():
        outputs = model(pixel_values, output_attentions=True)
        assert_matches(outputs.logits, vit(pixel_values).logits)
    assert outputs.attentions[0].shape == (2, 3, 17, 17)
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "newt"}
    assert (*processor.image_mean, *processor.image_std) == (0.5, 0.5, 0.5, 0.25, 0.25, 0.25)
    assert (processor.size["height"], processor.resample) == (32, 3)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: mit\n" in card
    assert "Made by chance." in card
    assert str(tmp_path) not in card


def test_vit_encoder_of_a_rectangle(tmp_path, capsys):
    vit = randomise(ViTModel(ViTConfig(**SIZES | {"image_size": (32, 48)})))
    vit.save_pretrained(tmp_path / "vit")
    assert convert(tmp_path / "vit", tmp_path / "out") == 0
    assert "Left out, without effect on the outputs: pooler.dense.bias" in capsys.readouterr().out
    pixel_values = torch.randn(1, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        actual = AutoModel.from_pretrained(tmp_path / "out")(pixel_values)
        assert_matches(actual.last_hidden_state, vit(pixel_values).last_hidden_state)


@pytest.mark.parametrize(("attention_type", "num_representatives"), [("agent", 64), ("mita", 25)])
def test_attention_through_representatives(vit, pixel_values, tmp_path, attention_type, num_representatives):
    vit.save_pretrained(tmp_path / "vit")
    assert convert(tmp_path / "vit", tmp_path / "out", "--attention", attention_type) == 0
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert model.config.pooled_tokens == "patches"
    outputs = model(pixel_values, labels=torch.tensor([0, 2]), output_representative_attentions=True)
    outputs.loss.backward()
    assert outputs.representative_attentions[0].shape == (2, 3, num_representatives, 17)
    assert not torch.allclose(outputs.logits, vit(pixel_values).logits, rtol=1e-2)
    assert "fine-tune it" in (tmp_path / "out" / "README.md").read_text()


def test_dinov2(dinov2, pixel_values, tmp_path, capsys):
    dinov2.save_pretrained(tmp_path / "dinov2")
    assert convert(tmp_path / "dinov2", tmp_path / "out") == 0
    assert "Left out, without effect on the outputs: embeddings.mask_token." in capsys.readouterr().out
    model = AutoModel.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert_matches(model(pixel_values).last_hidden_state, dinov2(pixel_values).last_hidden_state)
    assert "arxiv.org/abs/2304.07193" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("layout", ["transformers", "original", "timm"])
def test_registers(layout, pixel_values, tmp_path, capsys):
    sizes = SIZES | {"num_register_tokens": 3, "mlp_ratio": 2}
    original = randomise(Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes)))
    if layout == "transformers":
        original.save_pretrained(tmp_path / "dinov2")
    else:
        weights = to_timm(original)
        if layout == "timm":  # timm adds the position of CLS to its token
            weights["reg_token"] = weights.pop("register_tokens")
            weights["cls_token"] = weights["cls_token"] + weights["pos_embed"][:, :1]
            weights["pos_embed"] = weights["pos_embed"][:, 1:]
        torch.save(weights, tmp_path / "dinov2")
    assert convert(tmp_path / "dinov2", tmp_path / "out", "--num-heads", 3) == 0
    model = AutoModel.from_pretrained(tmp_path / "out")
    assert model.config.num_register_tokens == 3
    with torch.no_grad():
        assert_matches(model(pixel_values).last_hidden_state, original(pixel_values).last_hidden_state)
    assert "Beside the original on one input of noise: differs by" in capsys.readouterr().out


def test_wrong_conversion_is_found(vit, tmp_path, monkeypatch, capsys):
    """The original's formulas are computed, too, so a wrong weight is found, and nothing is written."""
    vit.save_pretrained(tmp_path / "vit")

    def rename_wrongly(weights, origin):
        converted, dropped = convert_state_dict(weights, origin)
        query, value = (f"cbsa.layers.1.attention.{name}_proj.weight" for name in "qv")
        return converted | {query: converted[value], value: converted[query]}, dropped

    monkeypatch.setattr("cbsa_hf.conversion.convert.convert_state_dict", rename_wrongly)
    assert convert(tmp_path / "vit", tmp_path / "out") == 2
    assert "does not compute what the original computes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@needs_reference
@pytest.mark.parametrize("name", ["cbt_patch8", "crate_patchify_patch16", "tost_conv_patch16", "segmenter_cbt"])
def test_formulas_of_the_originals(name):
    """The formulas that conversions are compared with give the recorded outputs of the reference implementations."""
    tensors = load_file(REFERENCE / f"{name}.safetensors")
    weights = {k.removeprefix("state_dict."): v for k, v in tensors.items() if k.startswith("state_dict.")}
    config = CBSAConfig(num_attention_heads=3, layer_norm_eps=1e-5)
    found = original_outputs(weights, detect_origin(weights), config, tensors["input.pixel_values"])
    expected = tensors.get("output.logits", tensors.get("output.mask_logits_at_patch_grid"))
    assert_matches(found, expected.flatten(2) if expected.ndim == 4 else expected)


def test_timm(vit, dinov2, pixel_values, tmp_path):
    for module in vit.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6  # timm's
    folder = tmp_path / "timm"
    folder.mkdir()
    save_file(to_timm(vit), folder / "model.safetensors")
    (folder / "config.json").write_text('{"architecture": "vit", "pretrained_cfg": {"mean": [0.5, 0.5, 0.5]}}')
    torch.save({"model": to_timm(dinov2)}, tmp_path / "dinov2.pth")
    assert convert(folder, tmp_path / "vit", "--num-heads", 3) == 0
    assert convert(tmp_path / "dinov2.pth", tmp_path / "dinov2", "--num-heads", 3) == 0
    processor = AutoImageProcessor.from_pretrained(tmp_path / "vit")
    assert list(processor.image_mean) == [0.5] * 3
    assert list(processor.image_std) == [0.229, 0.224, 0.225]
    with torch.no_grad():
        logits = AutoModelForImageClassification.from_pretrained(tmp_path / "vit")(pixel_values).logits
        assert_matches(logits, vit(pixel_values).logits)
        actual = AutoModel.from_pretrained(tmp_path / "dinov2")(pixel_values)
        assert_matches(actual.last_hidden_state, dinov2(pixel_values).last_hidden_state)


def reference_segmenter(origin: str) -> dict[str, torch.Tensor]:
    """Weights of the recorded encoder, by the names of a checkpoint, with one of the two recorded decoders."""
    decoder = {
        "cbt-segmenter": ("segmenter_cbt", "state_dict.decoder.", "decoder."),
        "segmenter": ("segmenter_mask_transformer_decoder", "state_dict.", "decoder."),
    }[origin]
    weights = {}
    for file, theirs, prefix in (("segmenter_cbt", "state_dict.encoder.", "encoder."), decoder):
        tensors = load_file(REFERENCE / f"{file}.safetensors")
        weights |= {prefix + k.removeprefix(theirs): v for k, v in tensors.items() if k.startswith(theirs)}
    return weights


@needs_reference
@pytest.mark.parametrize("origin", ["cbt-segmenter", "segmenter"])
@pytest.mark.parametrize(("under", "prefix"), [(None, ""), ("model", ""), ("state_dict", "module.")])
def test_segmenters(origin, under, prefix, tmp_path, capsys):
    weights = {prefix + key: tensor for key, tensor in reference_segmenter(origin).items()}
    torch.save({under: weights, "n_cls": 150} if under else weights, tmp_path / "checkpoint.pth")
    (tmp_path / "variant.yml").write_text("dataset_kwargs:\n  normalization: vit\n")
    assert convert(tmp_path / "checkpoint.pth", tmp_path / "out", "--num-heads", 3) == 0
    printed = capsys.readouterr().out
    assert f"CBSAForSemanticSegmentation from {origin}" in printed
    assert "Left out, without effect on the outputs: encoder.head.bias, encoder.head.weight." in printed

    model = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "out")
    tensors = load_file(REFERENCE / "segmenter_cbt.safetensors")
    with torch.no_grad():
        tokens, grid, outputs = model.encode(tensors["input.pixel_values"], {})
        assert_matches(outputs.last_hidden_state, tensors["output.encoder_last_hidden_state"])
        if origin == "segmenter":
            tensors = load_file(REFERENCE / "segmenter_mask_transformer_decoder.safetensors")
            tokens = tensors["input.patch_tokens"]
        assert_matches(model.decoder(tokens, grid)[0], tensors["output.mask_logits_at_patch_grid"])
    assert model.config.position_interpolation == "bilinear"
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert isinstance(processor, SegformerImageProcessorPil)
    assert processor.size["height"] == 192
    assert processor.image_std[0] == (0.5 if origin == "segmenter" else 0.229)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: image-segmentation" in card
    assert f"for {model.config.num_labels} classes" in card


@needs_reference
def test_verify_of_a_segmenter(tmp_path, capsys):
    recording = REFERENCE / "segmenter_cbt.safetensors"
    assert convert(recording, tmp_path / "out", "--num-heads", 3, "--verify", recording) == 0
    printed = capsys.readouterr().out
    assert "encoder_last_hidden_state: differs by" in printed
    assert "mask_logits_at_patch_grid: differs by" in printed


@needs_reference
@pytest.mark.parametrize(
    ("origin", "change", "message"),
    [
        ("segmenter", {"decoder.proj_patch": None}, "The weights lack what becomes `decoder.patch_proj.weight`"),
        ("segmenter", {"decoder.cls_emb": None}, "The weights lack what becomes `decoder.class_embeddings`"),
        ("segmenter", {"decoder.head.weight": (20, 48)}, "`decoder.head.weight` has no place in a CBSA model"),
        ("segmenter", {"encoder.dist_token": (1, 1, 48)}, "`encoder.dist_token` is a token besides CLS"),
        ("segmenter", {"decoder.blocks.1.mlp.fc1.weight": (96, 48)}, "(192, 48) fits"),
        ("cbt-segmenter", {"decoder.net.layers.1.fn.step_x": None}, "becomes `decoder.layers.1.attention.step_x`"),
        (
            "cbt-segmenter",
            {"decoder.net.layers.0.fn.qkv.weight": (3, 3)},
            "is left over: the model has no such weight",
        ),
        ("cbt-segmenter", {"decoder.net.layers.0.fn.step_rep": (7, 1, 1)}, "(7, 1, 1) fits"),
    ],
)
def test_segmenters_that_do_not_fit_are_refused(origin, change, message, tmp_path, capsys):
    weights = reference_segmenter(origin)
    for key, shape in change.items():
        weights.pop(key, None)
        if shape is not None:
            weights[key] = torch.ones(shape)
    torch.save(weights, tmp_path / "checkpoint.pth")
    assert convert(tmp_path / "checkpoint.pth", tmp_path / "out", "--num-heads", 3) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pth"]


@pytest.mark.parametrize(("width", "num_heads"), [(192, 3), (576, 12), (1280, 16)])
def test_published_widths_tell_the_number_of_heads(width, num_heads, tmp_path):
    sizes = SIZES | {"hidden_size": width, "num_attention_heads": 1, "num_hidden_layers": 1}
    torch.save(to_timm(ViTForImageClassification(ViTConfig(**sizes))), tmp_path / "vit.pth")
    assert convert(tmp_path / "vit.pth", tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_attention_heads"] == num_heads


def make_bad_inputs(vit):
    """Write checkpoints that cannot be converted to the working directory."""
    weights = to_timm(vit)
    torch.save(weights, "timm.pth")
    torch.save({"state_dict": weights, "hook": MakesFolder(Path("executed"))}, "code.pth")
    torch.save([1, 2], "list.pth")
    torch.save({"conv1.weight": torch.ones(3)}, "resnet.pth")
    torch.save({k: v for k, v in weights.items() if k != "blocks.1.norm1.bias"}, "missing.pth")
    torch.save(weights | {"blocks.0.attn.q_norm.weight": torch.ones(8)}, "left_over.pth")
    torch.save(weights | {"blocks.7.norm1.bias": torch.ones(24)}, "gap.pth")
    torch.save(weights | {"dist_token": torch.ones(1, 1, 24)}, "distilled.pth")
    torch.save(weights | {"norm.weight": torch.ones(25)}, "shape.pth")
    torch.save(weights | {"pos_embed": weights["pos_embed"][:, 1:]}, "positions.pth")
    for name in ("timm", "code"):
        content = Path(f"{name}.pth").read_bytes()
        Path(f"cut_{name}.pth").write_bytes(content[: len(content) // 2])
    Path("text.pth").write_text("no checkpoint")
    Path("nothing.pth").touch()
    Path("text.safetensors").write_text("no checkpoint")
    save_file(weights, "timm.safetensors")
    Path("cut.safetensors").write_bytes(Path("timm.safetensors").read_bytes()[:-100])
    save_file({"input.pixel_values": torch.ones(1, 3, 16, 16)}, "small.safetensors")
    save_file({"input.pixel_values": torch.ones(1, 3, 32, 32)}, "unrecorded.safetensors")
    Path("full").mkdir()
    Path("full/file").touch()
    Path("empty").mkdir()
    DeiTForImageClassification(DeiTConfig(**SIZES)).save_pretrained("deit")
    Dinov2ForImageClassification(Dinov2Config(**SIZES)).save_pretrained("dinov2")
    Dinov2WithRegistersForImageClassification(Dinov2WithRegistersConfig(**SIZES)).save_pretrained("registers")
    DINOv3ViTModel(DINOv3ViTConfig(**SIZES)).save_pretrained("dinov3")
    rotary = {k: v for k, v in weights.items() if k != "pos_embed"} | {"rope_embed.periods": torch.ones(2)}
    torch.save(rotary, "dinov3.pth")
    Dinov2Model(Dinov2Config(**SIZES, use_swiglu_ffn=True)).save_pretrained("swiglu")
    ViTForImageClassification(ViTConfig(**SIZES, hidden_act="quick_gelu")).save_pretrained("quick_gelu")
    for name, config in (
        ("no_config", None),
        ("beit", '{"model_type": "beit"}'),
        ("no_json", "{"),
        ("wrong", '{"model_type": "vit", "hidden_size": "wide"}'),
    ):
        vit.save_pretrained(name)
        Path(name, "config.json").unlink()
        if config:
            Path(name, "config.json").write_text(config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.pth"], "nowhere.pth is neither a file, nor a folder, nor the id of a model"),
        (["no/such/model"], "is neither a file, nor a folder, nor the id of a model"),
        (["empty"], "has no model.safetensors or pytorch_model.bin in it"),
        (["text.pth"], "is not a checkpoint, or is cut short"),
        (["nothing.pth"], "is not a checkpoint, or is cut short"),
        (["cut_timm.pth"], "is not a checkpoint, or is cut short"),
        (["cut.safetensors"], "is not a checkpoint, or is cut short"),
        (["text.safetensors"], "is not a checkpoint, or is cut short"),
        (["code.pth"], "could run code and is not loaded (`weights_only=True`)"),
        (["cut_code.pth"], "is not a checkpoint, or is cut short"),
        (["list.pth"], "holds no state dict"),
        (["resnet.pth"], "no known origin (one is called `conv1.weight`)"),
        (["timm.pth"], "give it with --num-heads"),
        (["timm.pth", "--num-heads", "5"], "5 heads do not divide"),
        (["timm.pth", "--num-heads", "3", "--origin", "crate"], "has no place in a CBSA model"),
        (["missing.pth", "--num-heads", "3"], "lack what becomes `cbsa.layers.1.layernorm_before.bias`"),
        (["left_over.pth"], "`blocks.0.attn.q_norm.weight` has no place"),
        (["gap.pth", "--num-heads", "3"], "The weights lack what becomes `cbsa.layers.2"),
        (["distilled.pth"], "`dist_token` is a token besides CLS"),
        (["shape.pth", "--num-heads", "3"], "`cbsa.layernorm.weight` has the shape (25,); (24,) fits"),
        (["positions.pth", "--num-heads", "3"], "15 patches, which make no square"),
        (["deit"], "`deit.embeddings.distillation_token` is a token besides CLS"),
        (["dinov2"], "convert the backbone without classifier"),
        (["registers"], "convert the backbone without classifier"),
        (["dinov3"], "models with rotary positions, such as DINOv3, cannot be converted"),
        (["dinov3.pth"], "models with rotary positions, such as DINOv3, cannot be converted"),
        (["swiglu"], "is a SwiGLU feed-forward"),
        (["quick_gelu"], "The activation is 'quick_gelu'"),
        (["no_config"], "There is no no_config/config.json"),
        (["beit"], "is of a model of type beit"),
        (["no_json"], "is not a JSON file"),
        (["wrong"], "cannot be right"),
        (
            ["timm.safetensors", "--num-heads", "3", "--verify", "small.safetensors"],
            "does not fit the model's 32 x 32",
        ),
        (
            ["timm.safetensors", "--num-heads", "3", "--verify", "unrecorded.safetensors"],
            "has no output to compare, such as `output.logits`",
        ),
        (["timm.safetensors", "--num-heads", "3", "--verify", "timm.safetensors"], "has no `input.pixel_values`"),
        (["timm.safetensors", "--num-heads", "3", "--verify", "timm.pth"], "is not a file of safetensors"),
        (["timm.pth", "-o", "full"], "full exists and is not an empty folder"),
        (["timm.pth", "-o", "timm.pth"], "timm.pth exists and is not an empty folder"),
        (["timm.pth", "-o", "no/folder"], "There is no folder no"),
    ],
)
def test_bad_input_is_one_sentence(vit, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    make_bad_inputs(vit)
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert main(["convert", "-o", "out", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("cbsa: ")
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@needs_reference
def test_attention_of_a_reference_model_cannot_change(tmp_path, capsys):
    assert convert(REFERENCE / "cbt_patch8.safetensors", tmp_path / "out", "--attention", "softmax") == 2
    assert "The attention of origin cbt cannot become 'softmax', only cbsa." in capsys.readouterr().err


def test_empty_folder_is_filled(vit, tmp_path):
    vit.save_pretrained(tmp_path / "vit")
    (tmp_path / "out").mkdir()
    assert convert(tmp_path / "vit", tmp_path / "out") == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_failed_write_leaves_nothing(vit, tmp_path, monkeypatch, capsys):
    def fail(self, folder):
        raise OSError("No space left on device")

    vit.save_pretrained(tmp_path / "vit")
    monkeypatch.setattr(ViTImageProcessorPil, "save_pretrained", fail)
    assert convert(tmp_path / "vit", tmp_path / "out") == 2
    assert capsys.readouterr().err == "cbsa: No space left on device\n"
    assert [path.name for path in tmp_path.iterdir()] == ["vit"]


def test_malicious_weights_are_refused(tmp_path, capsys):
    """Weights that are compressed, expanded by strides, sparse, of wrong type or not finite are refused."""
    path = tmp_path / "weights.pt"

    def refuse(weights, message):
        torch.save(weights, path)
        refuse_file(message)

    def refuse_file(message):
        assert main(["convert", str(path), "-o", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
        assert not (tmp_path / "out").exists()

    refuse({"blocks.0.attn.qkv.weight": torch.zeros(1).expand(10**6, 10**6)}, "holds no state dict of dense tensors")
    refuse({"blocks.0.attn.qkv.weight": torch.zeros(3, device="meta")}, "holds no state dict of dense tensors")
    refuse({"blocks.0.attn.qkv.weight": torch.eye(3).to_sparse()}, "weights.pt")
    torch.manual_seed(0)
    weights = timm_weights()
    torch.save(weights, path)
    assert main(["convert", str(path), "-o", str(tmp_path / "right"), "--num-heads", "2"]) == 0
    capsys.readouterr()
    (name, *_) = [name for name in weights if name.endswith("attn.proj.bias")]
    wrong = {"of type torch.int64": weights[name].long(), "has values that are not finite": weights[name] / 0}
    for message, tensor in wrong.items():
        torch.save(weights | {name: tensor}, path)
        assert main(["convert", str(path), "-o", str(tmp_path / "out"), "--num-heads", "2"]) == 2
        assert message in capsys.readouterr().err
    torch.save(weights, path)
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry, content in entries.items():
            archive.writestr(entry, content)
    refuse_file("is not a checkpoint")


def timm_weights() -> dict[str, torch.Tensor]:
    """Weights of a ViT with one layer of width 8, by the names of timm."""
    width, shapes = 8, {}
    shapes |= {"cls_token": (1, 1, width), "pos_embed": (1, 5, width)}
    shapes |= {"patch_embed.proj.weight": (width, 3, 4, 4), "patch_embed.proj.bias": (width,)}
    layers = {
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "mlp.fc1": (16, width),
        "mlp.fc2": (width, 16),
    }
    for name, shape in layers.items():
        shapes |= {f"blocks.0.{name}.weight": shape, f"blocks.0.{name}.bias": shape[:1]}
    for name in ("blocks.0.norm1", "blocks.0.norm2", "norm"):
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}

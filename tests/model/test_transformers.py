"""Standard calls of Transformers work: pipelines, Trainer, adapters, backbones, dtypes and device maps."""

import copy
import itertools
from typing import get_args

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional as F
from transformers import (
    AutoBackbone,
    BertConfig,
    DetrConfig,
    DetrForObjectDetection,
    GPT2Config,
    Trainer,
    TrainingArguments,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTImageProcessorPil,
    pipeline,
)

from cbsa_hf import CBSABackbone, CBSAConfig, CBSAForImageClassification, CBSAModel
from cbsa_hf.attention_cbsa import ATTENTIONS, adaptive_bins
from cbsa_hf.configuration_cbsa import FeedForwardType, PatchEmbeddingType, RepresentativesType


@pytest.fixture
def saved(tiny_model, tmp_path):
    """The folder where the tiny classifier is saved, with an image processor."""
    tiny_model.save_pretrained(tmp_path / "saved")
    processor = ViTImageProcessorPil(size={"height": 32, "width": 48}, do_convert_rgb=True)
    processor.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def assert_all_learn(model: torch.nn.Module, except_for: str = "no such name"):
    """Assert that every parameter has a gradient, which is not zero everywhere."""
    for name, parameter in model.named_parameters():
        if except_for not in name:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


AXES = list(itertools.product(ATTENTIONS, *map(get_args, (FeedForwardType, PatchEmbeddingType, RepresentativesType))))


@pytest.mark.parametrize(("attention", "feed_forward", "patch_embedding", "representatives"), AXES)
def test_all_types_combine(tiny_config, tmp_path, attention, feed_forward, patch_embedding, representatives):
    values = tiny_config.to_dict() | {
        "attention_type": attention,
        "feed_forward_type": feed_forward,
        "patch_embedding_type": patch_embedding,
        "representatives_type": representatives,
    }
    if representatives == "learned" and attention not in ("cbsa", "agent", "mita"):
        message = f"`representatives_type='learned'` has no meaning for attention type '{attention}'"
        with pytest.raises(StrictDataclassError, match=message):
            CBSAConfig(**values)
        return
    torch.manual_seed(0)
    model = CBSAForImageClassification(CBSAConfig(**values))
    pixel_values = torch.randn(2, 3, 40, 56)
    model(pixel_values, labels=torch.tensor([0, 3]), interpolate_pos_encoding=True).loss.backward()
    # A bias of the keys shifts all scores of a query equally. Softmax ignores this, so its gradient is zero.
    assert_all_learn(model, except_for="k_proj.bias")
    model.eval().save_pretrained(tmp_path)
    logits = CBSAForImageClassification.from_pretrained(tmp_path)(pixel_values, interpolate_pos_encoding=True).logits
    torch.testing.assert_close(logits, model(pixel_values, interpolate_pos_encoding=True).logits)


@pytest.mark.parametrize("size", [(32, 48), (33, 47), (64, 24)])
def test_feature_maps_of_the_backbone(tiny_model, saved, size):
    backbone = CBSABackbone.from_pretrained(saved, out_features=["stem", "stage1", "stage3"])
    assert backbone.channels == [24, 24, 24]
    pixel_values = torch.randn(2, 3, *size)
    outputs = backbone(pixel_values, output_hidden_states=True, output_attentions=True)
    height, width = -(-size[0] // 8), -(-size[1] // 8)
    assert [feature_map.shape for feature_map in outputs.feature_maps] == [(2, 24, height, width)] * 3
    expected = tiny_model(pixel_values, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
    assert len(outputs.hidden_states) == len(expected) == 4
    assert [attention.shape for attention in outputs.attentions] == [
        (2, 2, 1 + height * width, 1 + height * width)
    ] * 3
    for feature_map, index in zip(outputs.feature_maps, (0, 1, 3), strict=True):
        tokens = F.layer_norm(expected[index], (24,), *tiny_model.cbsa.layernorm.parameters())
        for row, column in ((0, 0), (0, width - 1), (height - 1, 1)):
            torch.testing.assert_close(feature_map[:, :, row, column], tokens[:, 1 + row * width + column])
    assert backbone(pixel_values).hidden_states is None


def test_backbone_stages(tiny_config):
    with pytest.raises((ValueError, StrictDataclassError), match="out_features must be a subset of stage_names"):
        CBSAConfig(num_hidden_layers=3, out_features=["stage4"])
    tiny_config.out_indices = [1, 2]
    backbone = AutoBackbone.from_config(tiny_config)
    assert isinstance(backbone, CBSABackbone)
    assert backbone.out_features == ["stage1", "stage2"]
    with pytest.raises(ValueError, match="A backbone does not return `representative_attentions`"):
        backbone(torch.randn(1, 3, 32, 48), output_representative_attentions=True)


@pytest.fixture
def backbone_config(tiny_config) -> CBSAConfig:
    tiny_config.out_features = ["stem", "stage1", "stage2", "stage3"]
    return tiny_config


def test_upernet(backbone_config):
    torch.manual_seed(0)
    config = UperNetConfig(
        backbone_config=backbone_config,
        hidden_size=16,
        auxiliary_channels=8,
        auxiliary_in_channels=24,
        pool_scales=[1, 2],
        num_labels=4,
    )
    model = UperNetForSemanticSegmentation(config)
    labels = torch.randint(0, 4, (2, 40, 56))
    outputs = model(torch.randn(2, 3, 40, 56), labels=labels)
    assert outputs.logits.shape == (2, 4, 40, 56)
    outputs.loss.backward()
    assert_all_learn(model.backbone)


def test_detr(backbone_config):
    torch.manual_seed(0)
    backbone_config.out_features = ["stage3"]
    config = DetrConfig(
        backbone_config=backbone_config,
        use_timm_backbone=False,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=5,
        num_labels=3,
    )
    model = DetrForObjectDetection(config)
    box = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.4]])}
    outputs = model(torch.randn(2, 3, 40, 56), labels=[box, box])
    assert outputs.pred_boxes.shape == (2, 5, 4)
    outputs.loss.backward()
    assert_all_learn(model.model.backbone.model)


@pytest.mark.parametrize("decoder", ["gpt2", "bert"])
def test_vision_encoder_decoder(tiny_config, tmp_path, decoder):
    torch.manual_seed(0)
    if decoder == "gpt2":
        decoder_config = GPT2Config(vocab_size=20, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    else:
        decoder_config = BertConfig(
            vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(tiny_config, decoder_config)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    model = VisionEncoderDecoderModel(config)
    pixel_values = torch.randn(2, 3, 32, 48)
    outputs = model(pixel_values=pixel_values, labels=torch.randint(2, 20, (2, 6)))
    outputs.loss.backward()
    assert_all_learn(model.encoder)

    model.eval().generation_config.eos_token_id = None
    generated = model.generate(pixel_values, max_new_tokens=5, do_sample=False)
    assert generated.shape == (2, 6)
    logits = model(pixel_values=pixel_values, decoder_input_ids=generated[:, :-1]).logits
    assert torch.equal(logits.argmax(-1), generated[:, 1:])
    model.save_pretrained(tmp_path)
    again = VisionEncoderDecoderModel.from_pretrained(tmp_path)
    assert torch.equal(again.generate(pixel_values, max_new_tokens=5, do_sample=False), generated)


def test_pipelines(tiny_model, saved, noise):
    inputs = ViTImageProcessorPil.from_pretrained(saved)(noise, return_tensors="pt")["pixel_values"]
    scores = pipeline("image-classification", model=str(saved))(noise, top_k=5)
    probabilities = tiny_model(inputs).logits.softmax(-1)[0]
    for score in scores:
        index = tiny_model.config.label2id[score["label"]]
        assert score["score"] == pytest.approx(probabilities[index].item(), abs=1e-5)
    features = pipeline("image-feature-extraction", model=str(saved))(noise)
    torch.testing.assert_close(torch.tensor(features), tiny_model.cbsa(inputs).last_hidden_state, rtol=1e-4, atol=1e-4)


def test_trainer_learns(tiny_config, tmp_path):
    torch.manual_seed(0)
    brightness = (-1.0, 1.0)  # of the two classes
    data = [{"pixel_values": torch.randn(3, 32, 48) + brightness[i % 2], "labels": i % 2} for i in range(32)]
    trainer = Trainer(
        CBSAForImageClassification(tiny_config),
        TrainingArguments(
            tmp_path,
            max_steps=20,
            per_device_train_batch_size=16,
            learning_rate=1e-2,
            label_smoothing_factor=0.1,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            save_steps=20,
        ),
        train_dataset=data,
    )
    trainer.train()
    predictions = trainer.predict(data)
    assert (predictions.predictions.argmax(-1) == predictions.label_ids).mean() > 0.9
    saved = CBSAForImageClassification.from_pretrained(tmp_path / "checkpoint-20")
    assert torch.equal(saved.classifier.weight, trainer.model.classifier.weight.cpu())


def test_lora(tiny_model, tmp_path):
    pixel_values, labels = torch.randn(2, 3, 32, 48), torch.tensor([1, 4])
    plain = tiny_model(pixel_values).logits
    model = get_peft_model(copy.deepcopy(tiny_model), LoraConfig(r=2, target_modules=["proj", "out_proj"]))
    torch.testing.assert_close(model(pixel_values).logits, plain)  # an adapter starts at zero
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model(pixel_values, labels=labels).loss.backward()
    learning = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(learning) == 3 * 2 * 2  # layers, linear layers in each, A and B
    assert all("lora_" in name and ".attention." in name for name in learning)

    model.save_pretrained(tmp_path)
    adapted = model(pixel_values).logits
    assert not torch.allclose(adapted, plain, atol=1e-2)
    torch.testing.assert_close(PeftModel.from_pretrained(tiny_model, tmp_path)(pixel_values).logits, adapted)


def test_trained_lora_is_reloaded(tiny_model, tmp_path):
    """An adapter does not save batch norm statistics, so its training must not change them."""
    plain = copy.deepcopy(tiny_model)
    model = get_peft_model(tiny_model, LoraConfig(r=2, target_modules=["proj"], modules_to_save=["classifier"]))
    data = [{"pixel_values": 2 + 3 * torch.randn(3, 32, 48), "labels": i % 5} for i in range(16)]
    arguments = {"learning_rate": 1e-2, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    trainer = Trainer(model, TrainingArguments(tmp_path, max_steps=3, **arguments), train_dataset=data)
    trainer.train()
    model.save_pretrained(tmp_path / "adapter")
    pixel_values = torch.randn(2, 3, 32, 48)
    logits = model.eval()(pixel_values).logits
    assert not torch.allclose(logits, plain(pixel_values).logits, atol=1e-2)
    torch.testing.assert_close(PeftModel.from_pretrained(plain, tmp_path / "adapter")(pixel_values).logits, logits)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_compiles_without_graph_breaks(tiny_config, attention):
    tiny_config.attention_type = attention
    torch.compiler.reset()  # otherwise all operators together reach the limit of recompilations
    model = CBSAForImageClassification(tiny_config).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    pixel_values = torch.randn(2, 3, 32, 48)
    torch.testing.assert_close(compiled(pixel_values).logits, model(pixel_values).logits)
    # The eager call comes first, since the first request for outputs installs hooks in all Transformers models.
    expected = model(pixel_values, output_attentions=True, output_hidden_states=True)
    outputs = compiled(pixel_values, output_attentions=True, output_hidden_states=True)
    assert len(outputs.attentions) == 3 and len(outputs.hidden_states) == 4
    torch.testing.assert_close(outputs.attentions, expected.attentions)


@pytest.mark.parametrize(("length", "bins"), [(7, 3), (3, 7), (16, 8), (1, 4), (13, 8), (5, 1)])
def test_bins_equal_adaptive_pooling(length, bins):
    values = torch.randn(2, length, dtype=torch.float64)
    pooled = values @ adaptive_bins(length, bins, values).T
    torch.testing.assert_close(pooled, F.adaptive_avg_pool1d(values, bins))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.01)])
@pytest.mark.parametrize("size", [(32, 48), (40, 56)])
def test_half_precision(tiny_model, saved, dtype, tolerance, size):
    """Logits are of size 1. They differ from float32 by at most 0.1 in bfloat16, and 0.01 in float16."""
    model = CBSAForImageClassification.from_pretrained(saved, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    pixel_values = torch.randn(2, 3, *size)
    logits = model(pixel_values, interpolate_pos_encoding=True).logits
    assert logits.dtype == dtype
    expected = tiny_model(pixel_values, interpolate_pos_encoding=True).logits
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("offloaded", [False, True])
def test_device_map(tiny_model, saved, tmp_path, offloaded):
    device_map = "auto"
    if offloaded:
        parts = ["embeddings", "layers.0", "layers.1", "layers.2", "layernorm"]
        device_map = {f"cbsa.{part}": "disk" if "layers" in part else "cpu" for part in parts} | {"classifier": "cpu"}
    model = CBSAForImageClassification.from_pretrained(
        saved, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    pixel_values = torch.randn(2, 3, 32, 48)
    torch.testing.assert_close(model(pixel_values).logits.cpu(), tiny_model(pixel_values).logits)


def test_new_number_of_labels(tiny_model, saved):
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        CBSAForImageClassification.from_pretrained(saved, num_labels=7)
    model = CBSAForImageClassification.from_pretrained(saved, num_labels=7, ignore_mismatched_sizes=True)
    pixel_values = torch.randn(2, 3, 32, 48)
    assert model(pixel_values).logits.shape == (2, 7)
    torch.testing.assert_close(model.cbsa(pixel_values).pooler_output, tiny_model.cbsa(pixel_values).pooler_output)


def test_zero_labels_give_the_features(tiny_config):
    tiny_config.num_labels = 0
    model = CBSAForImageClassification(tiny_config).eval()
    pixel_values = torch.randn(2, 3, 32, 48)
    torch.testing.assert_close(model(pixel_values).logits, model.cbsa(pixel_values).pooler_output)


def test_only_eager_attention_is_supported(saved):
    assert CBSAModel.from_pretrained(saved, attn_implementation="eager").config._attn_implementation == "eager"
    for name in ("sdpa", "flash_attention_2", "flex_attention"):
        with pytest.raises(ValueError, match="does not support"):
            CBSAModel.from_pretrained(saved, attn_implementation=name)

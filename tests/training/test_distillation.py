"""Teachers and their targets, against values computed by hand."""

import pytest
import torch
from conftest import MEAN, STD
from torch.nn import functional as F
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    LevitConfig,
    LevitForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTImageProcessorPil,
)

from training.data.classification import TrainingImages
from training.tasks.distillation import DistillationDataset, write_targets
from training.tasks.teachers import AutoTeacher, EfficientNetLite, Teacher


class ColourTeacher(torch.nn.Module):
    """A teacher whose feature maps are the mean colours of patches, so that the map of any crop is known."""

    stride, ratios, widths, num_labels, label2id = 8, (1, 2), [3, 3], 3, None
    image_mean, image_std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

    def forward(self, pixel_values):
        return pixel_values.mean((2, 3)), [F.avg_pool2d(pixel_values, 8), F.avg_pool2d(pixel_values, 16)]


class TestDistillation:
    def test_teacher_gets_its_own_normalisation_and_size(self, monkeypatch):
        monkeypatch.setattr("training.tasks.teachers.AutoTeacher", lambda name: ColourTeacher())
        teacher = Teacher("colours", MEAN, STD, patch_size=4)
        pixels = torch.rand(2, 3, 8, 12)
        normalised = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        logits, (fine, _) = teacher(normalised)
        assert fine.shape == (2, 3, 2, 3)
        torch.testing.assert_close(logits, F.interpolate(pixels, (16, 24), mode="bilinear").mean((2, 3)))
        torch.testing.assert_close(fine, F.avg_pool2d(F.interpolate(pixels, (16, 24), mode="bilinear"), 8))

    def test_maps_are_mixed_like_the_pixels(self, monkeypatch, labelled, processor, tmp_path):
        monkeypatch.setattr("training.tasks.teachers.AutoTeacher", lambda name: ColourTeacher())
        settings = {
            "max_corrupt": 0,
            "crop_sizes": [32],
            "num_epochs": 1,
            "min_crop_scale": 1.0,
            "seed": 0,
            "cutmix_alpha": 1.0,
        }
        settings |= {"dataset": labelled, "processor": processor}
        teacher = Teacher("colours", MEAN, STD, patch_size=2)
        write_targets(teacher, TrainingImages(**settings), processor, 128, tmp_path / "targets")
        item = DistillationDataset(teacher, tmp_path / "targets", **settings)[0]
        pixels = item["pixel_values"] * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
        assert (item["teacher_map_0"] - F.avg_pool2d(pixels, 2)).abs().mean() < 0.02

    def test_targets_are_cropped_like_the_image(self, monkeypatch, labelled, processor, tmp_path):
        monkeypatch.setattr("training.tasks.teachers.AutoTeacher", lambda name: ColourTeacher())
        settings = {
            "dataset": labelled,
            "max_corrupt": 0,
            "processor": processor,
            "crop_sizes": [32],
            "num_epochs": 1,
            "min_crop_scale": 0.3,
            "mixup_alpha": 0.0,
            "seed": 0,
        }
        teacher = Teacher("colours", MEAN, STD, patch_size=2)
        images = TrainingImages(**settings)
        write_targets(teacher, images, processor, 128, tmp_path / "targets")  # much finer than the crops
        dataset = DistillationDataset(teacher, tmp_path / "targets", **settings)
        scale, shift = torch.tensor(STD).view(3, 1, 1), torch.tensor(MEAN).view(3, 1, 1)
        for index in range(len(images)):
            item = dataset[index]
            torch.testing.assert_close(item["pixel_values"], images[index]["pixel_values"])
            pixels = item["pixel_values"] * scale + shift
            for i, size in enumerate((2, 4)):
                error = (item[f"teacher_map_{i}"] - F.avg_pool2d(pixels, size)).abs().mean()
                assert error < 0.02  # neighbouring crops differ by 0.1 and more
                wrong = (item[f"teacher_map_{i}"] - F.avg_pool2d(pixels, size).flip(2)).abs().mean()
                assert error < wrong

    def test_efficientnet_lite(self):
        """Logits equal those of the network, and the feature maps have strides of 16 and 32."""
        teacher = EfficientNetLite(0).eval()
        pixels = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            logits, (fine, coarse) = teacher(pixels)
            torch.testing.assert_close(logits, teacher.network(pixels))
        assert fine.shape == (1, 112, 4, 6)
        assert coarse.shape == (1, 1280, 2, 3)
        assert teacher.widths == [112, 1280]

    def test_vit_as_teacher(self, vit):
        model, folder = vit
        teacher = AutoTeacher(str(folder)).eval()
        pixels = torch.randn(2, 3, 32, 48)
        logits, (features,) = teacher(pixels)
        outputs = model(pixels, interpolate_pos_encoding=True, output_hidden_states=True)
        torch.testing.assert_close(logits, outputs.logits)
        torch.testing.assert_close(features[1, :, 2, 3], outputs.hidden_states[-1][1, 1 + 2 * 6 + 3])
        assert (teacher.stride, teacher.widths) == (8, [16])

    @pytest.mark.parametrize(
        ("model_class", "config"),
        [
            (ConvNextForImageClassification, ConvNextConfig(hidden_sizes=[4, 4, 6, 10], depths=[1] * 4)),
            (
                ResNetForImageClassification,
                ResNetConfig(embedding_size=4, hidden_sizes=[4, 4, 6, 10], depths=[1] * 4, layer_type="basic"),
            ),
        ],
    )
    def test_convolutional_network_as_teacher(self, tmp_path, model_class, config):
        """The stride is that of the last map, 32. ConvNeXt has a `patch_size` of 4, which says nothing about it."""
        model = model_class(config).eval()
        model.save_pretrained(tmp_path)
        ViTImageProcessorPil(image_mean=MEAN, image_std=STD).save_pretrained(tmp_path)
        teacher = Teacher(str(tmp_path), MEAN, STD, patch_size=4)
        assert teacher.network.widths == [10]
        pixels = torch.randn(2, 3, 8, 12)
        logits, (features,) = teacher(pixels)
        outputs = model(F.interpolate(pixels, (64, 96), mode="bilinear"), output_hidden_states=True)
        assert features.shape == (2, 10, 2, 3)
        torch.testing.assert_close(features, outputs.hidden_states[-1])
        torch.testing.assert_close(logits, outputs.logits)

    def test_network_without_a_feature_map_raises(self, tmp_path):
        sizes = {"hidden_sizes": [16] * 3, "num_attention_heads": [2] * 3, "depths": [1] * 3, "key_dim": [4] * 3}
        LevitForImageClassification(LevitConfig(**sizes)).save_pretrained(tmp_path)  # for images of one size
        ViTImageProcessorPil().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="cannot teach: its last hidden state is no map of the image that grows"):
            AutoTeacher(str(tmp_path))

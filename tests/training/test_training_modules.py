"""The pieces of the training scripts, each against something worked out by hand."""

import dataclasses
import json
import multiprocessing
import re
import signal
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    LevitConfig,
    LevitForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTImageProcessorPil,
)

from arguments import (
    OPTIMIZERS,
    ComparisonArguments,
    PretrainingArguments,
    ScoringArguments,
    SegmentationArguments,
    parse_arguments,
)
from cbsa_hf import CBSAConfig, CBSAForImageClassification
from data.classification import TrainingImages
from data.loading import find_columns, find_mask_columns, load_images
from data.segmentation import IGNORED, TrainingMasks, class_weights, read_mask, read_names
from data.streaming import StreamedRows
from engine.interruption import outlive_interruption
from engine.optimization import build_optimizer, build_scheduler, parameter_groups
from evaluation.metrics import MeanIoU, count_pixels
from tasks.distillation import DistillationDataset, write_targets
from tasks.segmentation import SegmentationLoss
from tasks.teachers import AutoTeacher, EfficientNetLite, Teacher


MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]


@pytest.fixture
def processor():
    return ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD, do_convert_rgb=True)


class TestArguments:
    NAMES = ["--dataset_name=nowhere", "--output_dir=nowhere"]
    RECIPE = "dataset_name: somewhere\nlearning_rate: 1e-4\ncrop_sizes: [96, 128]\nkeep_best: true\nteacher:\n"

    def test_command_line_overrides_the_recipe(self, tmp_path):
        (tmp_path / "recipe.yaml").write_text(self.RECIPE)
        given = ["--config", str(tmp_path / "recipe.yaml"), "--output_dir", "out", "--crop_sizes", "64"]
        args = parse_arguments(PretrainingArguments, given)
        assert (args.dataset_name, args.learning_rate, args.keep_best) == ("somewhere", 1e-4, True)
        assert (args.crop_sizes, args.teacher, args.batch_size) == ([64], None, 64)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("batchsize: 8", "names `batchsize`, which the script does not know; did you mean `batch_size`?"),
            ("- a list", "has to be a list of `name: value` lines"),
            ("a: [", "is not YAML"),
        ],
    )
    def test_bad_recipe(self, tmp_path, text, message):
        (tmp_path / "recipe.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"recipe\.yaml") as error:
            parse_arguments(PretrainingArguments, ["--config", str(tmp_path / "recipe.yaml")])
        assert message in str(error.value)

    @pytest.mark.parametrize(
        ("name", "arguments_class"),
        [
            ("cbsa-tiny-camvid", SegmentationArguments),
            ("cbsa-tiny-camvid-2", SegmentationArguments),
            ("cbsa-tiny-imagenette", PretrainingArguments),
            ("comparison", ComparisonArguments),
        ],
    )
    def test_every_recipe_is_understood(self, name, arguments_class):
        recipe = ROOT / "training" / "recipes" / f"{name}.yaml"
        args = parse_arguments(arguments_class, ["--config", str(recipe), *self.NAMES])
        for option, value in yaml.safe_load(recipe.read_text()).items():
            assert getattr(args, option) == value
        assert len(list(recipe.parent.iterdir())) == 4

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--num_epochs=0"], "`--num_epochs` is 0, and has to be at least 1."),
            (["--num_workers=-1"], "`--num_workers` is -1, and has to be at least 0."),
            (["--crop_sizes", "64", "0"], "`--crop_sizes` is 0, and has to be at least 1."),
            (["--num_train_images=8"], "`--num_train_images` does nothing without `--streaming`."),
            (["--teacher_cache=answers"], "`--teacher_cache` does nothing without `--teacher`."),
            (["--teeth=8"], "names `teeth`, which the script does not know; `--help` lists those that it knows."),
        ],
    )
    def test_bad_options(self, arguments, message):
        with pytest.raises(ValueError) as error:
            parse_arguments(PretrainingArguments, [*self.NAMES, *arguments])
        assert message in str(error.value)

    def test_help_has_groups(self, capsys):
        """Every option stands in one of them, but for `--help` and `--config`."""
        with pytest.raises(SystemExit):
            parse_arguments(ScoringArguments, ["--help"])
        options, *groups = capsys.readouterr().out.split("options:")[1].split("\n\n")
        assert re.findall(r"^  .*?(--\w+)", options, re.M) == ["--help", "--config"]
        titles = [group.split(":")[0].strip() for group in groups]
        assert titles == ["what to score", "data", "semantic and zero-shot segmentation", "output"]
        named = re.findall(r"^  (--\w+)", "\n".join(groups), re.M)
        assert sorted(named) == sorted(f"--{option.name}" for option in dataclasses.fields(ScoringArguments))

    def test_good_options(self):
        args = parse_arguments(SegmentationArguments, [*self.NAMES, "--task=x", "--no_photometric_distortion"])
        assert args.photometric_distortion is False
        assert parse_arguments(PretrainingArguments, [*self.NAMES, "--num_workers=0"]).num_workers == 0

    @pytest.mark.parametrize(
        "name", ["seed", "attention_type", "feed_forward_type", "resume_from_checkpoint", "push_to_hub"]
    )
    def test_a_comparison_has_no_options_of_one_run(self, name):
        with pytest.raises(ValueError, match=f"names `{name}`, which the script does not know"):
            parse_arguments(ComparisonArguments, [*self.NAMES, f"--{name}=1"])


class TestColumns:
    @pytest.fixture
    def rows(self):
        types = {name: Image() for name in ("image", "depth", "label")}
        types |= {name: ClassLabel(names=["x", "y"]) for name in ("kind", "mood")}
        types["age"] = Value("int64")
        return Dataset.from_dict({name: [] for name in types}, features=Features(types))

    def test_found_by_type_or_named(self, rows):
        assert find_columns(rows) == ["image", "kind"]
        assert find_columns(rows, "depth", "mood") == ["depth", "mood"]
        assert find_mask_columns(rows.remove_columns("depth")) == ["image", "label"]
        assert find_mask_columns(rows, "image") == ["image", "label"]
        assert find_mask_columns(rows, "label", "depth") == ["label", "depth"]
        assert find_mask_columns(rows.remove_columns("label"), label_column="depth") == ["image", "depth"]

    def test_what_cannot_be_found(self, rows):
        with pytest.raises(ValueError, match="no column 'photo'; it has image, depth, label, kind, mood, age"):
            find_columns(rows, image_column="photo")
        with pytest.raises(ValueError, match="needs an `Image` and a `ClassLabel` column"):
            find_columns(rows, label_column="age")
        with pytest.raises(ValueError, match=r"found were the images \['image', 'depth'\] and the masks \['label'\]"):
            find_mask_columns(rows)


class TestStreaming:
    def order(self, stream, epoch):
        stream.set_epoch(epoch)
        return [row["label"] for _, row in stream]

    def test_order(self):
        """Every row once; another order in each epoch and for each seed, and the same again for the same ones."""
        rows = Dataset.from_dict({"label": list(range(40))}).to_iterable_dataset(num_shards=4)
        first, again, other = (StreamedRows(rows, 40, seed) for seed in (0, 0, 1))
        orders = [self.order(first, 0), self.order(first, 1), self.order(other, 0)]
        assert all(sorted(order) == list(range(40)) for order in orders)
        assert len(set(map(tuple, orders))) == 3
        assert [self.order(again, 0), self.order(again, 1)] == orders[:2]

    def test_items_are_those_of_a_split_in_memory(self, labelled, processor):
        """In the stream's order, by every number of workers."""
        settings = {"max_corrupt": 0, "processor": processor, "crop_sizes": [32], "num_epochs": 1}
        settings |= {"min_crop_scale": 0.3, "mixup_alpha": 0.0, "seed": 0}
        stream = StreamedRows(labelled.to_iterable_dataset(), 8, seed=0)
        positions = [
            [image["bytes"] for image in self.encoded(labelled)].index(row["image"]["bytes"]) for _, row in stream
        ]
        expected = TrainingImages(dataset=labelled.select(positions), **settings)
        for workers in (0, 2):
            images = TrainingImages(dataset=stream, **settings)
            loader = torch.utils.data.DataLoader(images, batch_size=2, sampler=stream, num_workers=workers)
            items = {name: torch.cat([batch[name] for batch in loader]) for name in ("pixel_values", "labels")}
            for index in range(8):
                assert all(torch.equal(items[name][index], expected[index][name]) for name in items)

    @staticmethod
    def encoded(dataset):
        return dataset.cast_column("image", Image(decode=False))["image"][:]

    def test_broken_images(self, labelled, processor):
        """The next of the batch takes a broken one's place; each epoch counts anew."""
        encoded = self.encoded(labelled)
        encoded[5]["bytes"] = encoded[5]["bytes"][:60]
        rows = Dataset.from_dict({"image": encoded, "label": labelled["label"][:]}, features=labelled.features)
        stream = StreamedRows(rows.to_iterable_dataset(), 8, seed=0)
        settings = {"processor": processor, "crop_sizes": [32], "num_epochs": 2, "min_crop_scale": 1.0}
        images = TrainingImages(stream, max_corrupt=1, mixup_alpha=0.0, seed=0, **settings)
        for epoch in range(2):
            images.set_epoch(epoch)
            stream.set_epoch(epoch)
            batch = list(stream)
            broken = [row["image"]["bytes"] for _, row in batch].index(encoded[5]["bytes"])
            labels = [row["label"] for _, row in batch]
            labels[broken] = labels[(broken + 1) % 8]
            assert [item["labels"].item() for item in images.__getitems__(batch)] == labels
            assert images.corrupt.sum() == 1

    def test_unknown_length(self, labelled):
        with pytest.raises(ValueError, match="does not say how many images it has: give `--num_train_images`"):
            StreamedRows(labelled.to_iterable_dataset(), None, seed=0)


class TestMixtures:
    SETTINGS = {"max_corrupt": 0, "crop_sizes": [32], "num_epochs": 1, "min_crop_scale": 1.0, "seed": 0}

    def test_each_pixel_is_of_one_of_two_images(self, labelled, processor):
        """CutMix pastes a rectangle, whose share of the pixels is the other label's probability."""
        plain = TrainingImages(labelled, processor=processor, **self.SETTINGS)
        mixed = TrainingImages(labelled, processor=processor, cutmix_alpha=1.0, **self.SETTINGS)
        shares = []
        for index in range(len(labelled)):
            pixels, label = plain[index]["pixel_values"], plain[index]["labels"]
            item = mixed[index]
            pasted = (item["pixel_values"] != pixels).any(0)
            rows, columns = pasted.any(1).nonzero(), pasted.any(0).nonzero()
            assert pasted.sum() == len(rows) * len(columns)  # a rectangle
            share = pasted.float().mean()
            shares.append(share.item())
            assert item["labels"].sum() == pytest.approx(1)
            others = item["labels"].clone()
            others[label] = 0
            assert others.sum() == 0 or others.sum() == pytest.approx(share.item(), abs=1e-6)
        assert max(shares) - min(shares) > 0.2

    def test_maps_are_mixed_as_the_pixels_are(self, monkeypatch, labelled, processor, tmp_path):
        monkeypatch.setattr("tasks.teachers.AutoTeacher", lambda name: ColourTeacher())
        settings = {**self.SETTINGS, "dataset": labelled, "processor": processor, "cutmix_alpha": 1.0}
        teacher = Teacher("colours", MEAN, STD, patch_size=2)
        write_targets(teacher, TrainingImages(**settings), processor, 128, tmp_path / "answers")
        item = DistillationDataset(teacher, tmp_path / "answers", **settings)[0]
        pixels = item["pixel_values"] * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
        assert (item["teacher_map_0"] - F.avg_pool2d(pixels, 2)).abs().mean() < 0.02

    def test_both_kinds(self, labelled, processor):
        images = TrainingImages(labelled, processor=processor, mixup_alpha=1.0, cutmix_alpha=1.0, **self.SETTINGS)
        weights = [images.mixing_weights(8, np.random.default_rng(i)) for i in range(50)]
        assert 10 < sum(tensor.unique().numel() > 1 or tensor.max() in (0, 1) for tensor in weights) < 40

    def test_a_batch_has_one_size(self, labelled, processor):
        settings = {**self.SETTINGS, "crop_sizes": [16, 24, 32], "random_crop_sizes": True, "num_epochs": 9}
        images = TrainingImages(labelled, processor=processor, **settings)
        found = set()
        for epoch in range(9):
            images.set_epoch(epoch)
            batches = [images.__getitems__([first, first + 1]) for first in range(0, 8, 2)]
            sizes = [{item["pixel_values"].shape for item in batch} for batch in batches]
            assert all(len(shapes) == 1 for shapes in sizes)
            assert [images.crop_size(first) for first in range(0, 8, 2)] == [shapes.pop()[-1] for shapes in sizes]
            found |= {images.crop_size(first) for first in range(8)}
        assert found == {16, 24, 32}


class TestOptimization:
    def test_groups(self, tiny_model):
        groups = parameter_groups(tiny_model, 3, learning_rate=1.0, weight_decay=0.1, layer_decay=0.5)
        found = {
            id(p): (group["lr"], group["weight_decay"], group["use_muon"]) for group in groups for p in group["params"]
        }
        expected = {
            "cbsa.embeddings.position_embeddings": (1 / 16, 0, False),
            "cbsa.embeddings.patch_embeddings.layers.0.weight": (1 / 16, 0.1, True),
            "cbsa.layers.0.attention.proj.weight": (1 / 8, 0.1, True),
            "cbsa.layers.2.attention.step_x": (1 / 2, 0, False),
            "cbsa.layers.2.layernorm_before.weight": (1 / 2, 0, False),
            "cbsa.layers.2.feed_forward.weight": (1 / 2, 0.1, True),
            "cbsa.layernorm.weight": (1, 0, False),
            "classifier.weight": (1, 0.1, False),
            "classifier.bias": (1, 0, False),
        }
        parameters = dict(tiny_model.named_parameters())
        assert {name: found[id(parameters[name])] for name in expected} == expected
        assert len(found) == len(parameters)

    def test_lion_takes_steps_of_one_size(self):
        weight = torch.nn.Parameter(torch.tensor([[1.0, -2.0]]))
        optimizer = build_optimizer("lion", [{"params": [weight], "weight_decay": 0.0}], 0.1)
        weight.grad = torch.tensor([[3.0, -0.01]])
        optimizer.step()
        assert weight.tolist() == [[pytest.approx(0.9), pytest.approx(-1.9)]]

    def test_muon_moves_every_direction_of_a_matrix_alike(self):
        torch.manual_seed(0)
        weight, bias = torch.nn.Parameter(torch.zeros(6, 4)), torch.nn.Parameter(torch.zeros(4))
        weight.grad, bias.grad = torch.randn(6, 4) @ torch.diag(torch.tensor([9.0, 3.0, 1.0, 0.3])), torch.randn(4)
        gradient = weight.grad.clone()
        groups = [{"params": [weight], "use_muon": True}, {"params": [bias], "use_muon": False}]
        build_optimizer("muon", [{"lr": 0.1, "weight_decay": 0.0, **group} for group in groups], 0.1).step()
        u, expected, vh = torch.linalg.svd(gradient.double(), full_matrices=False)
        expected /= expected.norm()
        for _ in range(5):  # Newton-Schulz steps, which on a CPU are float32
            expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
        moved = -(u.T @ weight.detach().double() @ vh.T) / (0.1 * 0.2 * 6**0.5)
        assert torch.allclose(moved, torch.diag(expected), atol=1e-5)
        assert bias.detach().abs() == pytest.approx(torch.full((4,), 0.1), rel=1e-4)  # AdamW's first step

    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    @pytest.mark.parametrize(
        ("name", "middle"), [("cosine", 0.5 * (1 + np.cos(np.pi * 0.5))), ("polynomial", 0.5**0.9)]
    )
    def test_schedule(self, name, middle, optimizer):
        groups = [{"params": [torch.nn.Parameter(torch.zeros(2, 2))], "lr": 2.0, "use_muon": True}]
        optimizer = build_optimizer(optimizer, groups, 2.0)
        scheduler = build_scheduler(name, optimizer, num_steps=12, num_warmup_steps=1.5)
        rates = []
        for _ in range(12):
            rates.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
        assert rates[:3] == pytest.approx([0, 1, 2])
        assert rates[7] == pytest.approx(2 * middle)
        assert scheduler.get_last_lr()[0] == pytest.approx(0, abs=1e-6)


class ColourTeacher(torch.nn.Module):
    """A teacher whose maps are the pixels themselves, averaged over patches: what a crop of them is can be told."""

    stride, ratios, widths, num_labels, label2id = 8, (1, 2), [3, 3], 3, None
    image_mean, image_std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

    def forward(self, pixel_values):
        return pixel_values.mean((2, 3)), [F.avg_pool2d(pixel_values, 8), F.avg_pool2d(pixel_values, 16)]


class TestDistillation:
    def test_normalisation_and_size(self, monkeypatch):
        monkeypatch.setattr("tasks.teachers.AutoTeacher", lambda name: ColourTeacher())
        teacher = Teacher("colours", MEAN, STD, patch_size=4)
        pixels = torch.rand(2, 3, 8, 12)
        normalised = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        logits, (fine, _) = teacher(normalised)
        assert fine.shape == (2, 3, 2, 3)
        torch.testing.assert_close(logits, F.interpolate(pixels, (16, 24), mode="bilinear").mean((2, 3)))
        torch.testing.assert_close(fine, F.avg_pool2d(F.interpolate(pixels, (16, 24), mode="bilinear"), 8))

    def test_answers_are_cropped_as_the_image_is(self, monkeypatch, labelled, processor, tmp_path):
        monkeypatch.setattr("tasks.teachers.AutoTeacher", lambda name: ColourTeacher())
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
        write_targets(teacher, images, processor, 128, tmp_path / "answers")  # much finer than the crops
        taught = DistillationDataset(teacher, tmp_path / "answers", **settings)
        scale, shift = torch.tensor(STD).view(3, 1, 1), torch.tensor(MEAN).view(3, 1, 1)
        for index in range(len(images)):
            item = taught[index]
            torch.testing.assert_close(item["pixel_values"], images[index]["pixel_values"])
            pixels = item["pixel_values"] * scale + shift
            for i, size in enumerate((2, 4)):
                error = (item[f"teacher_map_{i}"] - F.avg_pool2d(pixels, size)).abs().mean()
                assert error < 0.02  # neighbouring crops differ by 0.1 and more
                wrong = (item[f"teacher_map_{i}"] - F.avg_pool2d(pixels, size).flip(2)).abs().mean()
                assert error < wrong

    def test_efficientnet_lite(self):
        """The package's own logits, and maps of stride 16 and 32 of the pixels it is given."""
        teacher = EfficientNetLite(0).eval()
        pixels = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            logits, (fine, coarse) = teacher(pixels)
            torch.testing.assert_close(logits, teacher.network(pixels))
        assert fine.shape == (1, 112, 4, 6)
        assert coarse.shape == (1, 1280, 2, 3)
        assert teacher.widths == [112, 1280]

    def test_a_vit_teaches(self, vit):
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
    def test_a_convolutional_network_teaches(self, tmp_path, model_class, config):
        """Whatever its configuration calls a patch: ConvNeXt's has 4 pixels, its map a stride of 32."""
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

    def test_a_network_without_a_map(self, tmp_path):
        sizes = {"hidden_sizes": [16] * 3, "num_attention_heads": [2] * 3, "depths": [1] * 3, "key_dim": [4] * 3}
        LevitForImageClassification(LevitConfig(**sizes)).save_pretrained(tmp_path)  # for images of one size
        ViTImageProcessorPil().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="cannot teach: its last hidden state is no map of the image that grows"):
            AutoTeacher(str(tmp_path))


class TestSegmentation:
    @pytest.fixture
    def masked(self):
        """Images whose colour is the label: 40 for 0, 80 for 1, 120 for 2, 160 where nothing counts."""
        random = np.random.default_rng(0)
        masks = [np.kron(random.integers(0, 4, (5, 6)), np.ones((12, 12))).astype(np.uint8) for _ in range(6)]
        images = [PILImage.fromarray(np.stack([40 + 40 * mask] * 3, -1).astype(np.uint8)) for mask in masks]
        labels = [PILImage.fromarray(np.where(mask == 3, IGNORED, mask).astype(np.uint8)) for mask in masks]
        features = Features({"image": Image(), "label": Image()})
        return Dataset.from_dict({"image": images, "label": labels}, features=features)

    def make(self, masked, processor, **changes):
        settings = {
            "processor": processor,
            "crop_size": (48, 56),
            "image_size": None,
            "resize_ratios": (0.5, 2.0),
            "photometric_distortion": False,
            "seed": 0,
        }
        return TrainingMasks(masked, 0, num_labels=3, reduce_labels=False, **{**settings, **changes})

    def test_image_and_mask_stay_together(self, masked, processor):
        images = self.make(masked, processor)
        seen = set()
        for index in range(len(images)):
            item = images[index]
            assert item["pixel_values"].shape == (3, 48, 56)
            red = (item["pixel_values"][0] * STD[0] + MEAN[0]) * 255
            colours = torch.where(item["labels"] == IGNORED, 160.0, 40.0 + 40 * item["labels"])
            colours = torch.where(red < 10, 0.0, colours)  # padding is black, and must not count
            assert (item["labels"][red < 10] == IGNORED).all()
            # Images are resized smoothly, masks are not: they differ at edges alone.
            assert ((red - colours).abs() < 1).float().mean() > 0.75
            seen |= set(item["labels"].unique().tolist())
        assert seen == {0, 1, 2, IGNORED}

    @pytest.mark.parametrize(("image_size", "ratio"), [(36, 1.0), (72, 0.5)])
    def test_images_have_their_size_first(self, masked, processor, image_size, ratio):
        """The whole of each, 72 x 60, at half its size."""
        images = self.make(masked, processor, crop_size=(30, 36), image_size=image_size, resize_ratios=(ratio, ratio))
        for index, row in enumerate(masked):
            expected = np.asarray(row["label"].resize((36, 30), PILImage.Resampling.NEAREST))
            labels = images[index]["labels"].numpy()
            assert np.array_equal(labels, expected) or np.array_equal(labels, expected[:, ::-1])

    def test_what_is_drawn_depends_on_seed_epoch_and_index(self, masked, processor):
        images, again = (self.make(masked, processor, photometric_distortion=True) for _ in range(2))
        torch.manual_seed(1)
        first = images[2]["pixel_values"]
        torch.manual_seed(2)
        state = torch.get_rng_state()
        torch.testing.assert_close(first, again[2]["pixel_values"], rtol=0, atol=0)
        assert torch.equal(state, torch.get_rng_state())
        images.set_epoch(1)
        assert not torch.equal(first, images[2]["pixel_values"])

    def test_reduced_labels(self):
        mask = PILImage.fromarray(np.array([[0, 1, 150, 255]], dtype=np.uint8))
        assert read_mask(mask, 150, reduce_labels=True).tolist() == [[IGNORED, 0, 149, IGNORED]]
        with pytest.raises(ValueError, match="has the label 150; masks are grey, with labels below 150"):
            read_mask(mask, 150, reduce_labels=False)

    def test_a_mask_of_another_size(self, masked, processor):
        turned = masked.map(lambda row: {"label": row["label"].transpose(PILImage.Transpose.ROTATE_90)})
        with pytest.raises(ValueError, match=r"Image 2 has \(72, 60\) pixels across and down, its mask \(60, 72\)."):
            self.make(turned, processor)[2]

    @pytest.mark.parametrize("names", [{"1": "a", "2": "b"}, {"0": "a", "2": "b"}, {"0": "a", "1": "a"}])
    def test_names_that_leave_gaps(self, tmp_path, names):
        (tmp_path / "id2label.json").write_text(json.dumps(names))
        with pytest.raises(ValueError, match="does not give each number from 0 on a name of its own"):
            read_names(None, str(tmp_path))

    @pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 4, 1.5])])
    def test_loss(self, weights):
        logits, labels = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
        labels[:, 1:3] = IGNORED
        task = SegmentationLoss(lambda pixel_values: SimpleNamespace(logits=logits), weights)
        expected = F.cross_entropy(logits, labels, weights, ignore_index=IGNORED)
        torch.testing.assert_close(task(None, labels)["loss"], expected)
        assert task(None, torch.full_like(labels, IGNORED))["loss"] == 0  # such as a crop of ADE20K

    def test_dice_joins_the_loss(self):
        logits, labels = torch.randn(3, 4, 6, 5), torch.randint(0, 3, (3, 6, 5))  # the last class is absent
        labels[0, :2] = IGNORED
        losses = [
            SegmentationLoss(lambda pixel_values: SimpleNamespace(logits=logits), None, dice)(None, labels)["loss"]
            for dice in (False, True)
        ]
        shares, overlaps = logits.double().softmax(1), []
        for k in range(3):
            probability = shares[:, k]
            inside, counts = labels == k, labels != IGNORED
            overlaps.append(2 * probability[inside].sum() / (probability[counts].sum() + inside.sum()))
        torch.testing.assert_close(losses[1] - losses[0], 1 - sum(overlaps).float() / 3)

    def test_class_weights(self, masked, processor):
        images = self.make(masked, processor)
        counts = np.zeros(3)
        for row in masked:
            mask = np.asarray(row["label"])
            counts += [(mask == k).sum() for k in range(3)]
        np.testing.assert_allclose(class_weights(images), 1 / np.log(1.02 + counts / counts.sum()), rtol=1e-6)

    def test_mean_iou_is_that_of_all_pixels(self):
        random = np.random.default_rng(0)
        metric = MeanIoU(keep_in_memory=True)
        hits, unions, right, counted = np.zeros(4), np.zeros(4), 0, 0
        for shape in [(3, 5), (8, 2), (6, 6)]:
            predicted, labelled = random.integers(0, 3, shape), random.integers(0, 3, shape)
            labelled[0, 0] = 255
            counts = count_pixels(predicted, labelled, num_labels=4, ignore_index=255)
            names = ("intersection", "predicted", "labelled")
            metric.add_batch(**{name: counts[i][None] for i, name in enumerate(names)})
            for p, t in zip(predicted.flat, labelled.flat, strict=True):
                if t != 255:
                    counted += 1
                    right += p == t
                    for k in range(4):
                        hits[k] += p == k and t == k
                        unions[k] += p == k or t == k
        scores = metric.compute()
        assert scores["pixel_accuracy"] == pytest.approx(right / counted)
        assert scores["iou"][:3] == pytest.approx(hits[:3] / unions[:3])
        assert np.isnan(scores["iou"][3])  # a class that never occurs
        assert scores["mean_iou"] == pytest.approx(np.mean(hits[:3] / unions[:3]))


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="the sender of a signal is not told here")
def test_a_worker_ends_for_its_parent_alone():
    others = multiprocessing.active_children()
    batches = iter(DataLoader(range(100), num_workers=1, worker_init_fn=outlive_interruption))
    assert next(batches).item() == 0
    (worker,) = [child for child in multiprocessing.active_children() if child not in others]
    subprocess.run(["kill", str(worker.pid)], check=True)
    assert [next(batches).item() for _ in range(20)] == list(range(1, 21))
    worker.terminate()
    worker.join(60)
    assert worker.exitcode == 0


def test_a_data_set_that_is_a_script(tmp_path):
    (tmp_path / "scene").mkdir()
    (tmp_path / "scene" / "scene.py").write_text("raise RuntimeError('it ran')\n")
    with pytest.raises(ValueError, match=r"scene cannot be loaded: Dataset scripts are no longer supp.*scene\.py"):
        load_images(str(tmp_path / "scene"))


def test_drop_path():
    """In evaluation nothing is dropped; in training some updates are, and the mean is kept."""
    config = CBSAConfig(hidden_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=32, drop_path_rate=0.5)
    model = CBSAForImageClassification(config)
    assert [layer.drop_path.rate for layer in model.base_model.layers] == [0, 0.25, 0.5]
    drop_path = model.base_model.layers[2].drop_path
    updates = torch.ones(4000, 2, 3)
    assert torch.equal(drop_path.eval()(updates), updates)
    dropped = drop_path.train()(updates)
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(dropped, dropped[:, :1, :1].expand_as(dropped))
    assert dropped.mean() == pytest.approx(1, abs=0.1)


def test_accelerate_configurations_are_understood():
    from accelerate.commands.config.config_args import load_config_from_file

    files = sorted((ROOT / "training" / "accelerate").glob("*.yaml"))
    assert len(files) == 3
    processes = {file.stem: load_config_from_file(str(file)).num_processes for file in files}
    assert processes == {"1-gpu": 1, "8-gpus": 8, "4x8-gpus-fsdp": 32}

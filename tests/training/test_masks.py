"""Masks: augmentation, losses and metrics, against values computed by hand."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import MEAN, STD
from datasets import Array3D, Dataset, Features, Image
from PIL import Image as PILImage
from torch.nn import functional as F
from transformers import ViTImageProcessorPil

from training.data.loading import find_mask_columns, read_names
from training.data.segmentation import (
    IGNORED,
    SegmentationDataset,
    TrainingMasks,
    class_weights,
    read_mask,
)
from training.evaluation.metrics import MeanIoU, count_pixels
from training.tasks.segmentation import SegmentationLoss


class TestSegmentation:
    @pytest.fixture
    def masked(self):
        """Images whose grey values are the labels: 40 for 0, 80 for 1, 120 for 2, and 160 for ignored pixels."""
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

    def test_image_and_mask_are_augmented_alike(self, masked, processor):
        images = self.make(masked, processor)
        seen = set()
        for index in range(len(images)):
            item = images[index]
            assert item["pixel_values"].shape == (3, 48, 56)
            red = (item["pixel_values"][0] * STD[0] + MEAN[0]) * 255
            colours = torch.where(item["labels"] == IGNORED, 160.0, 40.0 + 40 * item["labels"])
            colours = torch.where(red < 10, 0.0, colours)  # padding is black, and ignored
            assert (item["labels"][red < 10] == IGNORED).all()
            # Images are interpolated and masks are not, so they differ at edges.
            assert ((red - colours).abs() < 1).float().mean() > 0.75
            seen |= set(item["labels"].unique().tolist())
        assert seen == {0, 1, 2, IGNORED}

    @pytest.mark.parametrize(("image_size", "ratio"), [(36, 1.0), (72, 0.5)])
    def test_image_size_and_resize_ratio_multiply(self, masked, processor, image_size, ratio):
        """In both cases an image of 72 x 60 pixels is shown whole, at half its size."""
        images = self.make(masked, processor, crop_size=(30, 36), image_size=image_size, resize_ratios=(ratio, ratio))
        for index, row in enumerate(masked):
            expected = np.asarray(row["label"].resize((36, 30), PILImage.Resampling.NEAREST))
            labels = images[index]["labels"].numpy()
            assert np.array_equal(labels, expected) or np.array_equal(labels, expected[:, ::-1])

    def test_augmentation_depends_on_seed_epoch_and_index(self, masked, processor):
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

    def test_mask_of_another_size_raises(self, masked, processor):
        turned = masked.map(lambda row: {"label": row["label"].transpose(PILImage.Transpose.ROTATE_90)})
        with pytest.raises(ValueError, match=r"Image 2 has \(72, 60\) pixels across and down, its mask \(60, 72\)."):
            self.make(turned, processor)[2]

    @pytest.mark.parametrize("names", [{"1": "a", "2": "b"}, {"0": "a", "2": "b"}, {"0": "a", "1": "a"}])
    def test_bad_names_of_classes_raise(self, tmp_path, names):
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
        assert task(None, torch.full_like(labels, IGNORED))["loss"] == 0  # as in some crops of ADE20K

    def test_dice_is_added_to_the_loss(self):
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

    @pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 3.0])])
    def test_loss_of_one_class(self, weights):
        """Binary cross-entropy of the sigmoid, and the Dice loss of the class and the background."""
        logits, labels = torch.randn(2, 1, 4, 5), torch.randint(0, 2, (2, 4, 5))
        labels[:, 1] = IGNORED
        losses = [
            SegmentationLoss(lambda pixel_values: SimpleNamespace(logits=logits), weights, dice)(None, labels)["loss"]
            for dice in (False, True)
        ]
        counts, share = labels != IGNORED, logits[:, 0].double().sigmoid()
        chosen = torch.where(labels == 1, share, 1 - share)[counts]
        importance = (torch.ones(2) if weights is None else weights)[labels[counts]]
        torch.testing.assert_close(losses[0].double(), -(importance * chosen.log()).sum() / importance.sum())
        overlaps = []
        for k, probability in enumerate((1 - share, share)):
            inside = labels == k
            overlaps.append(2 * probability[inside].sum() / (probability[counts].sum() + inside.sum()))
        torch.testing.assert_close((losses[1] - losses[0]).double(), 1 - sum(overlaps) / 2, rtol=1e-5, atol=1e-5)

    def test_masks_of_one_class(self):
        picture, mask = PILImage.new("RGB", (3, 2)), np.array([[0, 1, 255], [1, 0, 0]], dtype=np.uint8)
        rows = Dataset.from_dict(
            {"image": [picture] * 2, "label": [PILImage.fromarray(mask), PILImage.fromarray(2 * (mask % 255))]},
            features=Features({"image": Image(), "label": Image()}),
        )
        images = SegmentationDataset(rows, max_corrupt=0, num_labels=1, reduce_labels=False)
        assert np.array_equal(images.read(0)[1], mask)
        with pytest.raises(ValueError, match=r"has the label 2; .* or one class and 0 for its background"):
            images.read(1)

    @pytest.mark.parametrize("first", [False, True])
    def test_arrays_with_four_channels(self, first):
        random = np.random.default_rng(0)
        arrays = random.integers(0, 256, (2, 20, 30, 4), dtype=np.uint8)
        masks = [PILImage.fromarray(random.integers(0, 3, (20, 30), dtype=np.uint8)) for _ in range(2)]
        stored = arrays.transpose(0, 3, 1, 2) if first else arrays
        features = Features({"image": Array3D(stored.shape[1:], "uint8"), "label": Image()})
        rows = Dataset.from_dict({"image": list(stored), "label": masks}, features=features)
        assert find_mask_columns(rows) == ["image", "label"]
        image, labels = SegmentationDataset(rows, 0, 3, False, num_channels=4).read(1)
        assert np.array_equal(image, arrays[1]) and np.array_equal(labels, masks[1])
        processor = ViTImageProcessorPil(image_mean=[0.1, 0.2, 0.3, 0.4], image_std=[0.5] * 4)
        images = self.make(rows, processor, crop_size=(20, 30), resize_ratios=(1, 1))
        item = images[0]
        expected = (arrays[0] / 255 - [0.1, 0.2, 0.3, 0.4]) / 0.5
        flipped = not np.array_equal(item["labels"], masks[0])
        found = item["pixel_values"].permute(1, 2, 0).numpy()
        np.testing.assert_allclose(found[:, ::-1] if flipped else found, expected, atol=1e-5)
        assert len(images.sample()) == 2
        with pytest.raises(ValueError, match="4 channels cannot be distorted: give `--no_photometric_distortion`"):
            self.make(rows, processor, photometric_distortion=True)
        with pytest.raises(ValueError, match=r"'image' has arrays of shape .* and the model takes 3 channels"):
            SegmentationDataset(rows, 0, 3, False)

    def test_class_weights(self, masked, processor):
        images = self.make(masked, processor)
        counts = np.zeros(3)
        for row in masked:
            mask = np.asarray(row["label"])
            counts += [(mask == k).sum() for k in range(3)]
        np.testing.assert_allclose(class_weights(images), 1 / np.log(1.02 + counts / counts.sum()), rtol=1e-6)

    def test_mean_iou_is_over_all_pixels(self):
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

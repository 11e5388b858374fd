"""Columns, streams and augmentation of labelled images, against what is worked out by hand."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from transformers import (
    ViTImageProcessorPil,
)

from training.data.classification import TrainingImages
from training.data.loading import find_columns, find_mask_columns, load_images
from training.data.streaming import StreamedRows


MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]


@pytest.fixture
def processor():
    return ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD, do_convert_rgb=True)


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
        with pytest.raises(ValueError, match="needs an `Image` or `Array3D` and a `ClassLabel` column"):
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


def test_a_data_set_that_is_a_script(tmp_path):
    (tmp_path / "scene").mkdir()
    (tmp_path / "scene" / "scene.py").write_text("raise RuntimeError('it ran')\n")
    with pytest.raises(ValueError, match=r"scene cannot be loaded: Dataset scripts are no longer supp.*scene\.py"):
        load_images(str(tmp_path / "scene"))

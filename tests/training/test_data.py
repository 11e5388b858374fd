"""Columns, streams and augmentation of labelled images, against values computed by hand."""

import dataclasses

import numpy as np
import pytest
import torch
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    IterableDatasetDict,
    List,
    Value,
)

from training.arguments import DataArguments, PretrainingArguments
from training.data import loading
from training.data.classification import TrainingImages, ValidationImages
from training.data.labelled_images import check_labels
from training.data.loading import (
    MULTI_LABEL,
    class_names,
    find_columns,
    find_mask_columns,
    find_split,
    load_images,
    problem_type,
    select_labelled,
)
from training.data.streaming import StreamedRows
from training.engine.setup import choose_splits
from training.evaluation.metrics import average_precision


class TestColumns:
    @pytest.fixture
    def rows(self):
        types = {name: Image() for name in ("image", "depth", "label")}
        types |= {name: ClassLabel(names=["x", "y"]) for name in ("kind", "mood")}
        types["age"] = Value("int64")
        return Dataset.from_dict({name: [] for name in types}, features=Features(types))

    def test_columns_are_found_by_type_or_name(self, rows):
        assert find_columns(rows.remove_columns("mood")) == ["image", "kind"]
        assert find_columns(rows.rename_column("mood", "fine_label")) == ["image", "fine_label"]
        assert find_columns(rows, label_column="age") == ["image", "age"]
        assert find_columns(rows.remove_columns(["kind", "mood", "label"]).rename_column("age", "label")) == [
            "image",
            "label",
        ]
        assert find_columns(rows, "depth", "mood") == ["depth", "mood"]
        assert find_mask_columns(rows.remove_columns("depth")) == ["image", "label"]
        assert find_mask_columns(rows, "image") == ["image", "label"]
        assert find_mask_columns(rows, "label", "depth") == ["label", "depth"]
        named = rows.remove_columns("label").rename_column("depth", "semantic_segmentation")
        assert find_mask_columns(named) == ["image", "semantic_segmentation"]
        assert find_mask_columns(rows.remove_columns("label"), label_column="depth") == ["image", "depth"]

    def test_missing_or_ambiguous_columns_raise(self, rows):
        with pytest.raises(ValueError, match="no column 'photo'; it has image, depth, label, kind, mood, age"):
            find_columns(rows, image_column="photo")
        with pytest.raises(ValueError, match="or `Array3D`, and one of classes, called label, labels,"):
            find_columns(rows, label_column="depth")
        with pytest.raises(ValueError, match=r"^Which column is it, kind or mood\? Name it as `--label_column`\.$"):
            find_columns(rows)
        with pytest.raises(
            ValueError, match=r"^Which column is it, depth or photo or label\? Name it as `--image_col"
        ):
            find_columns(rows.rename_column("image", "photo").select_columns(["depth", "photo", "label", "kind"]))
        with pytest.raises(ValueError, match=r"found were the images \['image', 'depth'\] and the masks \['label'\]"):
            find_mask_columns(rows)


class TestClasses:
    def args(self, **values) -> DataArguments:
        return DataArguments(dataset_name="nowhere", **values)

    @pytest.mark.parametrize("values", [[1, 0], ["b", "a"], [[1, 0], []]], ids=["numbers", "strings", "lists"])
    @pytest.mark.parametrize("streaming", [False, True])
    def test_names_of_classes_in_a_file(self, labelled, tmp_path, values, streaming):
        (tmp_path / "names.json").write_text('{"1": "b", "0": "a"}')
        rows = labelled.select(range(2)).remove_columns("label").add_column("label", values)
        rows = rows.to_iterable_dataset() if streaming else rows
        named = select_labelled(rows, self.args(id2label=str(tmp_path / "names.json")))
        assert class_names(named) == ["a", "b"]
        assert [row["label"] for row in named] == ([[1, 0], []] if isinstance(values[0], list) else [1, 0])
        assert problem_type(named) == (MULTI_LABEL if isinstance(values[0], list) else None)

    def test_names_of_classes(self, labelled, tmp_path):
        (tmp_path / "names.json").write_text('{"0": "x", "1": "y"}')
        assert class_names(select_labelled(labelled, self.args())) == ["a", "b"]
        assert class_names(select_labelled(labelled, self.args(id2label=str(tmp_path / "names.json")))) == ["x", "y"]
        (tmp_path / "names.json").write_text('{"0": "x"}')
        with pytest.raises(ValueError, match="`--id2label` names 1 classes, and the data set has 2"):
            select_labelled(labelled, self.args(id2label=str(tmp_path / "names.json")))
        numbers = labelled.cast_column("label", Value("int64"))
        with pytest.raises(
            ValueError, match=r"names of the classes are not in nowhere.id2label\.json; give a JSON file"
        ):
            select_labelled(numbers, self.args())
        for content in ("[1]", "no JSON", "[" * 100_000):
            (tmp_path / "names.json").write_text(content)
            with pytest.raises(ValueError, match=r"names\.json is not a JSON file that maps numbers to names"):
                select_labelled(numbers, self.args(id2label=str(tmp_path / "names.json")))
        (tmp_path / "id2label.json").write_text('{"0": "x", "1": "y"}')
        own = DataArguments(dataset_name=str(tmp_path))
        assert class_names(select_labelled(numbers, own)) == ["x", "y"]

    def test_lists_of_labels(self, labelled, processor):
        features = Features({"image": Image(), "label": List(ClassLabel(names=["a", "b", "c"]))})
        lists = [[], [2], [0, 2], [1], [0], [0, 1, 2], [], [1]]
        rows = Dataset.from_dict({"image": labelled["image"][:], "label": lists}, features=features)
        check_labels(rows, "train", warns=False)
        settings = {"max_corrupt": 0, "processor": processor, "crop_sizes": [32], "num_epochs": 1, "seed": 0}
        expected = torch.tensor([[float(k in row) for k in range(3)] for row in lists])
        for images in (ValidationImages(rows, 0, processor), TrainingImages(rows, min_crop_scale=1.0, **settings)):
            assert torch.equal(torch.stack([images[i]["labels"] for i in range(8)]), expected)
        mixed = TrainingImages(rows, min_crop_scale=1.0, cutmix_alpha=1.0, **settings)[2]["labels"]
        assert all(any(mixed[k] == pytest.approx(s) for s in (0, mixed[0], mixed[2], 1)) for k in range(3))
        wrong = Dataset.from_dict({"image": labelled["image"][:1], "label": [[0, -1]]}, features=features)
        with pytest.raises(ValueError, match="Image 0 of the split 'train' has the label -1; the data set names the"):
            check_labels(wrong, "train")


class TestSplits:
    @pytest.fixture
    def splits(self):
        return DatasetDict(
            {"train": Dataset.from_dict({"x": list(range(10))}), "test": Dataset.from_dict({"x": [77]})}
        )

    @pytest.mark.parametrize(
        ("name", "values"),
        [
            ("train", range(10)),
            ("train[:80%]", range(8)),
            ("train[80%:]", [8, 9]),
            ("train[2:4]+test", [2, 3, 77]),
        ],
    )
    def test_parts_of_splits(self, splits, name, values):
        assert find_split(splits, name)["x"][:] == list(values)

    def test_unknown_split_raises(self, splits):
        for name in ("valid", "train[:", "train[:400%]", "valid[:10]"):
            with pytest.raises(
                ValueError, match=r"has no split '.*'; it has train, test, and parts such as 'train\[:80"
            ):
                find_split(splits, name)
        streams = IterableDatasetDict({name: split.to_iterable_dataset() for name, split in splits.items()})
        assert find_split(streams, "train") is streams["train"]
        with pytest.raises(ValueError, match=r"`--streaming` reads whole splits, and 'train\[:2\]' is a part"):
            find_split(streams, "train[:2]")

    def test_validation_images_are_taken_from_a_single_split(self, splits):
        del splits["test"]
        args = PretrainingArguments(dataset_name="x", output_dir="x", train_val_split=0.2)
        train, validation = (split["x"][:] for split in choose_splits(splits, args))
        assert (len(train), len(validation)) == (8, 2)
        assert sorted(train + validation) == list(range(10))
        again = [split["x"][:] for split in choose_splits(splits, dataclasses.replace(args, seed=1))]
        assert again == [train, validation]
        for share in (0.0, 1.0):
            with pytest.raises(ValueError, match=f"`--train_val_split {share}` has to be between 0 and 1"):
                choose_splits(splits, dataclasses.replace(args, train_val_split=share))
        with pytest.raises(ValueError, match=r"no split 'validation'; .* `--train_val_split 0\.1` validates on a"):
            choose_splits(splits, dataclasses.replace(args, train_val_split=None))


def test_average_precision():
    """Against the definition, with tied scores."""
    random = np.random.default_rng(0)
    scores, labels = random.integers(0, 6, 40) / 6, random.random(40) < 0.4
    precisions = [labels[scores >= score].mean() for score in scores[labels]]
    assert average_precision(scores, labels) == pytest.approx(np.mean(precisions))
    assert average_precision(np.array([0.9, 0.8, 0.1]), np.array([True, False, True])) == pytest.approx(
        (1 + 2 / 3) / 2
    )


class TestStreaming:
    def order(self, stream, epoch):
        stream.set_epoch(epoch)
        return [row["label"] for _, row in stream]

    def test_order(self):
        """Every epoch has each row once, in an order that depends on the epoch and the seed alone."""
        rows = Dataset.from_dict({"label": list(range(40))}).to_iterable_dataset(num_shards=4)
        first, again, other = (StreamedRows(rows, 40, seed) for seed in (0, 0, 1))
        orders = [self.order(first, 0), self.order(first, 1), self.order(other, 0)]
        assert all(sorted(order) == list(range(40)) for order in orders)
        assert len(set(map(tuple, orders))) == 3
        assert [self.order(again, 0), self.order(again, 1)] == orders[:2]

    def test_stream_gives_the_items_of_a_split_in_memory(self, labelled, processor):
        """In the same order, a stream gives the same items as a split in memory, with any number of workers."""
        settings = {"max_corrupt": 0, "processor": processor, "crop_sizes": [32], "num_epochs": 1}
        settings |= {"min_crop_scale": 0.3, "mixup_alpha": 0.0, "seed": 0}
        stream = StreamedRows(labelled.to_iterable_dataset(), 8, seed=0)
        encoded = [image["bytes"] for image in self.encoded(labelled)]
        positions = [encoded.index(row["image"]["bytes"]) for _, row in stream]
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

    def test_broken_image_is_replaced(self, labelled, processor):
        """The next image of the batch replaces a broken one. Each epoch counts broken images anew."""
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

    def test_processes_read_their_own_shards(self):
        """Shards are unequal, but each process reads the same number of rows, for its own places in the batches."""
        shards, opened = [range(9), range(9, 14), range(14, 26), range(26, 30)], []

        def read(shards):
            for shard in shards:
                opened.append(shard)
                yield from ({"label": label} for label in shard)

        def rows():
            features = Features({"label": Value("int64")})
            return IterableDataset.from_generator(read, features=features, gen_kwargs={"shards": shards})

        streams = [StreamedRows(rows(), 28, 0, batch_size=4, process=i, num_processes=2) for i in range(2)]
        for epoch in range(3):
            whole, read_by = [None] * 28, []
            for process, stream in enumerate(streams):
                opened.clear()
                stream.set_epoch(epoch)
                places = [(index, row["label"]) for index, row in stream if row is not None]
                assert [index for index, _ in places] == [i for i in range(28) if i // 2 % 2 == process]
                for index, label in places:
                    whole[index] = label
                read_by.append({shard.start for shard in opened})
                own = {label for shard in shards if shard.start in read_by[-1] for label in shard}
                found = [label for _, label in places]
                if len(own) < 14:  # some rows are repeated
                    assert set(found) == own
                else:  # some rows are not read in this epoch
                    assert set(found) <= own
                    assert len(set(found)) == 14
            assert not read_by[0] & read_by[1]
            assert [len(each) for each in read_by] == [2, 2]
        again = StreamedRows(rows(), 28, 0, batch_size=4, process=1, num_processes=2)
        again.set_epoch(2)
        assert [row and row["label"] for _, row in again] == [row and row["label"] for _, row in streams[1]]
        with pytest.raises(ValueError, match=r"3 processes cannot share the 4 shards \(files\) of the training split"):
            StreamedRows(rows(), 28, 0, batch_size=6, process=0, num_processes=3)

    def test_shards_without_an_image_raise(self):
        rows = IterableDataset.from_generator(lambda shards: iter(()), gen_kwargs={"shards": [0, 1]})
        rows = StreamedRows(rows.cast(Features({"label": Value("int64")})), 4, 0, 2, 0, 2)
        with pytest.raises(ValueError, match="The shards of process 0 have no image"):
            list(rows)

    def test_unknown_length_raises(self, labelled):
        with pytest.raises(ValueError, match="does not say how many images it has: give `--num_train_images`"):
            StreamedRows(labelled.to_iterable_dataset(), None, seed=0)


class TestMixtures:
    SETTINGS = {"max_corrupt": 0, "crop_sizes": [32], "num_epochs": 1, "min_crop_scale": 1.0, "seed": 0}

    def test_cutmix(self, labelled, processor):
        """CutMix pastes a rectangle. Its share of the pixels is the probability of the other label."""
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

    def test_mixup_and_cutmix_take_turns(self, labelled, processor):
        images = TrainingImages(labelled, processor=processor, mixup_alpha=1.0, cutmix_alpha=1.0, **self.SETTINGS)
        weights = [images.mixing_weights(8, np.random.default_rng(i)) for i in range(50)]
        assert 10 < sum(tensor.unique().numel() > 1 or tensor.max() in (0, 1) for tensor in weights) < 40

    def test_images_of_a_batch_have_one_size(self, labelled, processor):
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


def test_revision_is_only_for_the_hub(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="`--dataset_revision` is for data sets of the Hub, and "):
        load_images(str(tmp_path), revision="refs/convert/parquet")
    calls = []
    monkeypatch.setattr(loading, "load_dataset", lambda *names, **options: calls.append((names, options)) or {})
    load_images("somebody/scenes", revision="refs/convert/parquet")
    assert calls == [(("somebody/scenes", None), {"streaming": False, "revision": "refs/convert/parquet"})]


def test_dataset_script_is_refused(tmp_path):
    (tmp_path / "scene").mkdir()
    (tmp_path / "scene" / "scene.py").write_text("raise RuntimeError('it ran')\n")
    with pytest.raises(ValueError, match=r"scene cannot be loaded: Dataset scripts are no longer supp.*scene\.py"):
        load_images(str(tmp_path / "scene"))

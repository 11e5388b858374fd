"""Load data sets from the Hub or from local files, and find their splits, columns and classes."""

import json
from pathlib import Path

from datasets import (
    Array3D,
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    IterableDatasetDict,
    List,
    ReadInstruction,
    Value,
    concatenate_datasets,
    load_dataset,
)
from datasets.exceptions import DatasetGenerationError
from pyarrow import ArrowException

from training.arguments import DataArguments


IMAGE_TYPES = (Image, Array3D)  # arrays for models of another number of channels than 3
# The usual names, which decide where several columns have the right type.
IMAGE_NAMES = ("image", "img")
LABEL_NAMES = ("label", "labels", "fine_label")
MASK_NAMES = ("label", "mask", "annotation", "segmentation_mask", "semantic_segmentation")
MULTI_LABEL = "multi_label_classification"  # as configurations of Transformers call it


def load_images(
    name: str, config_name: str | None = None, streaming: bool = False, revision: str | None = None
) -> DatasetDict | IterableDatasetDict:
    """
    Load a data set by hub id, local folder (Parquet files or an image folder), or the path of one Parquet file.

    Args:
        name: the id or path.
        config_name: name of a configuration, if the data set has several.
        streaming: read rows when they are needed, not all at once.
        revision: branch, tag or commit of a data set of the Hub.

    Raises:
        ValueError: if there is no such data set, configuration or revision, it cannot be read, it is a script
            (`datasets` runs none), or its columns are not known before it is read.
    """
    if revision is not None and Path(name).exists():
        raise ValueError(f"`--dataset_revision` is for data sets of the Hub, and {name} is on this machine.")
    try:
        if name.endswith(".parquet"):
            splits = load_dataset("parquet", data_files=name, streaming=streaming)
        else:
            splits = load_dataset(name, config_name, streaming=streaming, revision=revision)
    except DatasetGenerationError as error:
        raise ValueError(f"{name} cannot be read: {error.__cause__ or error}") from error
    except (FileNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"{name} is neither a folder or Parquet file with images, nor the id of a data set that can be reached on "
            "the Hub."
        ) from error
    except (OSError, ArrowException) as error:  # a damaged file, if its rows are streamed
        raise ValueError(f"{name} cannot be read: {error}") from error
    except RuntimeError as error:  # the data set is a script
        raise ValueError(
            f"{name} cannot be loaded: {error}. The Hub may have it as Parquet: try `--dataset_revision "
            "refs/convert/parquet`."
        ) from error
    if any(split.features is None for split in splits.values()):
        raise ValueError(f"What columns {name} has is not known before it is read: leave out `--streaming`.")
    return splits


def find_split(splits: DatasetDict | IterableDatasetDict, name: str) -> Dataset | IterableDataset:
    """
    The split of that name, or a part of it as `datasets` writes it: `train[:80%]`, `train[:1000]+test`.

    Raises:
        ValueError: if there is none; the message names those there are.
    """
    if name in splits:
        return splits[name]
    try:
        parts = ReadInstruction.from_spec(name).to_absolute({key: len(split) for key, split in splits.items()})
    except TypeError as error:  # a stream has no length
        raise ValueError(f"`--streaming` reads whole splits, and {name!r} is a part: leave one out.") from error
    except ValueError as error:
        raise ValueError(
            f"The data set has no split {name!r}; it has {', '.join(splits)}, and parts such as "
            f"'{next(iter(splits))}[:80%]'."
        ) from error
    return concatenate_datasets([splits[part.splitname].select(range(part.from_, part.to)) for part in parts])


def columns_of_type(features: Features, kind: type | tuple[type, ...], name: str | None) -> list[str]:
    """
    Names of all columns of a type, or of several; with a name given, of that column, if it has the type.

    Raises:
        ValueError: if there is no column of that name.
    """
    if name is not None and name not in features:
        raise ValueError(f"The data set has no column {name!r}; it has {', '.join(features)}.")
    return [column for column, feature in features.items() if isinstance(feature, kind) and name in (None, column)]


def choose_column(columns: list[str], usual: tuple[str, ...], option: str) -> str:
    """
    The only one of the columns, or the only one with a usual name.

    Raises:
        ValueError: if that leaves several; the message asks which.
    """
    named = [column for column in columns if column in usual]
    for found in (columns, named):
        if len(found) == 1:
            return found[0]
    raise ValueError(f"Which column is it, {' or '.join(columns)}? Name it as `--{option}`.")


def class_type(feature: object) -> ClassLabel | None:
    """The classes of a column, of one label or of a list of labels; None of other columns."""
    feature = feature.feature if isinstance(feature, List) else feature
    return feature if isinstance(feature, ClassLabel) else None


def is_nameable(feature: object) -> bool:
    """Whether a column has whole numbers or strings, or lists of them, which names can make classes of."""
    feature = feature.feature if isinstance(feature, List) else feature
    return isinstance(feature, Value) and feature.dtype.startswith(("int", "uint", "string", "large_string"))


def find_columns(dataset: Dataset, image_column: str | None = None, label_column: str | None = None) -> list[str]:
    """
    Names of the image column and of the label column: those given, or found by their types. Images are of type `Image`
    or `Array3D`, labels are a `ClassLabel` or a list of them. Where there are none, labels are the numbers or strings
    in a column with a name in [`LABEL_NAMES`].

    Raises:
        ValueError: if there is no image column or no label column, or there are several and none has a usual name.
    """
    features = dataset.features
    images = columns_of_type(features, IMAGE_TYPES, image_column)
    columns = columns_of_type(features, (ClassLabel, List, Value), label_column)
    labels = [column for column in columns if class_type(features[column]) is not None]
    if not labels:
        named = [column for column in columns if column in (*LABEL_NAMES, label_column)]
        labels = [column for column in named if is_nameable(features[column])]
    if not images or not labels:
        raise ValueError(
            f"The data set needs a column of images, of type `Image` or `Array3D`, and one of classes, called "
            f"{', '.join(LABEL_NAMES)} or given as `--label_column`; it has {dict(features)}."
        )
    return [
        choose_column(images, IMAGE_NAMES, "image_column"),
        choose_column(labels, LABEL_NAMES, "label_column"),
    ]


def find_mask_columns(dataset: Dataset, image_column: str | None = None, label_column: str | None = None) -> list[str]:
    """
    Names of the image column and of the mask column: those given. By default the mask column is the one of type
    `Image` with a name in [`MASK_NAMES`].

    Raises:
        ValueError: if there is not exactly one of each.
    """
    images = columns_of_type(dataset.features, IMAGE_TYPES, image_column)
    masks = columns_of_type(dataset.features, Image, label_column)
    if label_column is None:
        masks = [name for name in masks if name in MASK_NAMES and name != image_column]
    images = [name for name in images if name not in masks]
    if len(images) != 1 or len(masks) != 1:
        raise ValueError(
            f"The data set needs one image column and one of masks, named {', '.join(MASK_NAMES)} or given as "
            f"`--label_column`; found were the images {images} and the masks {masks}."
        )
    return images + masks


def select_labelled(dataset: Dataset | IterableDataset, args: DataArguments) -> Dataset | IterableDataset:
    """
    The column of images and that of classes, as a `ClassLabel` or a list of them.

    Raises:
        ValueError: if there are no such columns, or the classes have no names; see [`find_columns`], [`read_names`].
    """
    image_column, label_column = find_columns(dataset, args.image_column, args.label_column)
    dataset = dataset.select_columns([image_column, label_column])
    feature = dataset.features[label_column]
    own = class_type(feature)
    if own is not None and args.id2label is None:
        return dataset
    names = list(read_names(args.id2label, args.dataset_name).values())
    if own is not None and len(names) != own.num_classes:
        raise ValueError(f"`--id2label` names {len(names)} classes, and the data set has {own.num_classes}.")
    classes = ClassLabel(names=names)
    return dataset.cast_column(label_column, List(classes) if isinstance(feature, List) else classes)


def select_masked(dataset: Dataset | IterableDataset, args: DataArguments) -> Dataset | IterableDataset:
    """The column of images and that of masks. Raises ValueError if there are no such columns."""
    return dataset.select_columns(find_mask_columns(dataset, args.image_column, args.label_column))


def class_names(dataset: Dataset) -> list[str]:
    """Names of the classes of a data set from [`select_labelled`]."""
    _, labels = dataset.features.values()
    return class_type(labels).names


def problem_type(dataset: Dataset) -> str | None:
    """What a configuration calls several labels an image; None of one label an image, which it finds out by itself."""
    _, labels = dataset.features.values()
    return MULTI_LABEL if isinstance(labels, List) else None


def read_names(path: str | None, dataset_name: str) -> dict[int, str]:
    """
    Names of the classes by number.

    Args:
        path: JSON file that maps numbers to names.
        dataset_name: folder of the data set; its `id2label.json` is read if no path is given.

    Raises:
        ValueError: if there is no such file, it is not such a mapping, its numbers do not run from 0 without gaps, or
            two classes have one name.
    """
    file = Path(path) if path is not None else Path(dataset_name) / "id2label.json"
    try:
        names = {int(number): str(name) for number, name in json.loads(file.read_text()).items()}
    except OSError as error:
        raise ValueError(
            f"The names of the classes are not in {file}; give a JSON file like {{'0': 'sky', ...}} as `--id2label`."
        ) from error
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is not a JSON file that maps numbers to names of classes.") from error
    if sorted(names) != list(range(len(names))) or len(set(names.values())) < len(names):
        raise ValueError(f"{file} does not give each number from 0 on a name of its own.")
    return dict(sorted(names.items()))

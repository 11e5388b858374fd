"""Load data sets from the Hub or from local files, and find their columns of images, labels and masks."""

from datasets import Array3D, ClassLabel, Dataset, DatasetDict, Image, IterableDatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError


IMAGE_TYPES = (Image, Array3D)  # arrays for models of another number of channels than 3
MASK_NAMES = ("label", "mask", "annotation", "segmentation_mask")


def load_images(
    name: str, config_name: str | None = None, streaming: bool = False
) -> DatasetDict | IterableDatasetDict:
    """
    Load a data set by hub id, local folder (Parquet files or an image folder), or the path of one Parquet file.

    Args:
        name: the id or path.
        config_name: name of a configuration, if the data set has several.
        streaming: read rows when they are needed, not all at once.

    Raises:
        ValueError: if there is no such data set or configuration, it cannot be read, it is a script (`datasets` runs
            none), or its columns are not known before it is read.
    """
    try:
        if name.endswith(".parquet"):
            splits = load_dataset("parquet", data_files=name, streaming=streaming)
        else:
            splits = load_dataset(name, config_name, streaming=streaming)
    except DatasetGenerationError as error:
        raise ValueError(f"{name} cannot be read: {error.__cause__ or error}") from error
    except (FileNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"{name} is neither a folder or Parquet file with images, nor the id of a data set that can be reached on "
            "the Hub."
        ) from error
    except RuntimeError as error:  # the data set is a script
        raise ValueError(f"{name} cannot be loaded: {error}.") from error
    if any(split.features is None for split in splits.values()):
        raise ValueError(f"What columns {name} has is not known before it is read: leave out `--streaming`.")
    return splits


def find_split(splits: DatasetDict, name: str) -> Dataset:
    """The split of that name. Raises ValueError if there is none; the message names those there are."""
    if name not in splits:
        raise ValueError(f"The data set has no split {name!r}; it has {', '.join(splits)}.")
    return splits[name]


def columns_of_type(dataset: Dataset, kind: type | tuple[type, ...], name: str | None) -> list[str]:
    """
    Names of all columns of a type, or of several; with a name given, of that column, if it has the type.

    Raises:
        ValueError: if there is no column of that name.
    """
    if name is not None and name not in dataset.features:
        raise ValueError(f"The data set has no column {name!r}; it has {', '.join(dataset.features)}.")
    return [
        column for column, feature in dataset.features.items() if isinstance(feature, kind) and name in (None, column)
    ]


def find_columns(dataset: Dataset, image_column: str | None = None, label_column: str | None = None) -> list[str]:
    """
    Names of the image column and of the label column: those given, or the first ones of type `Image` or `Array3D`, and
    `ClassLabel`.

    Raises:
        ValueError: if there is no image column, or no label column.
    """
    images = columns_of_type(dataset, IMAGE_TYPES, image_column)
    labels = columns_of_type(dataset, ClassLabel, label_column)
    if not images or not labels:
        raise ValueError(
            f"The data set needs an `Image` or `Array3D` and a `ClassLabel` column; it has {dict(dataset.features)}. "
            "Cast it with `datasets`, for example `dataset.cast_column('label', ClassLabel(names=[...]))`."
        )
    return [images[0], labels[0]]


def class_names(dataset: Dataset) -> list[str]:
    """Names of the classes of a data set with two columns, from the type of its label column."""
    _, labels = dataset.features.values()
    return labels.names


def find_mask_columns(dataset: Dataset, image_column: str | None = None, label_column: str | None = None) -> list[str]:
    """
    Names of the image column and of the mask column: those given. By default the mask column is the one of type
    `Image` with a name in [`MASK_NAMES`].

    Raises:
        ValueError: if there is not exactly one of each.
    """
    images = columns_of_type(dataset, IMAGE_TYPES, image_column)
    masks = columns_of_type(dataset, Image, label_column)
    if label_column is None:
        masks = [name for name in masks if name in MASK_NAMES and name != image_column]
    images = [name for name in images if name not in masks]
    if len(images) != 1 or len(masks) != 1:
        raise ValueError(
            f"The data set needs one image column and one of masks, named {', '.join(MASK_NAMES)} or given as "
            f"`--label_column`; found were the images {images} and the masks {masks}."
        )
    return images + masks

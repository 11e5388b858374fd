"""A training split whose rows are read when they are needed: nothing is downloaded or decoded before."""

from collections.abc import Iterator
from itertools import islice

from datasets import IterableDataset
from torch.utils.data import Sampler


BUFFER_SIZE = 1000


class WrongLength(ValueError):
    """A stream has another number of rows than expected."""


class StreamedRows(Sampler):
    """
    Rows of a streamed split, shuffled in a buffer of [`BUFFER_SIZE`] rows, by seed and epoch.

    It has two roles. For the `DataLoader` it is the sampler: it yields pairs (index, row) instead of indices, where
    index is the row's place in the epoch, and the row's image is still encoded. So `DataLoader` and Accelerate divide
    batches among processes, and skip them when a run is resumed, as they do for a split in memory. Every process reads
    the whole stream. For the data set of that loader it is the rows of the current batch: see [`hold`].

    Args:
        dataset: the split.
        num_rows: images per epoch; by default, as many as the split says it has.
        seed: seed of the run.

    Raises:
        ValueError: if the split does not say how many images it has, and `num_rows` is not given.
    """

    def __init__(self, dataset: IterableDataset, num_rows: int | None, seed: int):
        if num_rows is None:
            known = (dataset.info.splits or {}).get(str(dataset.split))
            num_rows = known and known.num_examples
        if not num_rows:
            raise ValueError("The data set does not say how many images it has: give `--num_train_images`.")
        self.features = dataset.features
        self.num_rows = num_rows
        self.encoded = dataset.decode(False)
        self.rows = self.encoded.shuffle(seed=seed, buffer_size=BUFFER_SIZE)

    def __len__(self) -> int:
        return self.num_rows

    def set_epoch(self, epoch: int):
        """Set the epoch that the order depends on."""
        self.rows.set_epoch(epoch)

    def first(self, count: int) -> list[dict]:
        """The first rows in the order of the split, with images still encoded."""
        return list(islice(self.encoded, count))

    def __iter__(self) -> Iterator[tuple[int, dict]]:
        count = 0
        for row in islice(self.rows, self.num_rows):
            yield count, row
            count += 1
        if count < self.num_rows:
            raise WrongLength(f"The training split has {count} images, not {self.num_rows}: see `--num_train_images`.")

    def hold(self, batch: list[tuple[int, dict]]) -> list[int]:
        """Keep the rows of a batch for [`__getitem__`], and return their indices."""
        self.indices, self.batch = zip(*batch, strict=True)
        return list(self.indices)

    def __getitem__(self, index: int) -> dict:
        """The row of that index, which is in the current batch, with its image still encoded."""
        return self.batch[index - self.indices[0]]

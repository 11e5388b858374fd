"""A training split that is read as it comes: nothing is downloaded or decoded before it is needed."""

from collections.abc import Iterator
from itertools import islice

from datasets import IterableDataset
from torch.utils.data import Sampler


BUFFER_SIZE = 1000


class WrongLength(ValueError):
    """A stream has another number of rows than was told."""


class StreamedRows(Sampler):
    """
    Rows of a streamed split, shuffled among [`BUFFER_SIZE`] others by seed and epoch.

    It is the sampler of its own `DataLoader`: in place of indices it yields (index, row), the row's place in the epoch
    and the row, the image still encoded. So batches are divided among processes and skipped when a run is resumed as
    those of a split in memory are, and whoever needs an image decodes it. Every process reads the whole stream, once.

    To its data set it is the rows of the batch in hand, by their index.

    Args:
        dataset: the split.
        num_rows: images per epoch; what the split says when None.
        seed: seed of the run.

    Raises:
        ValueError: the split does not say how many images it has.
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
        self.rows.set_epoch(epoch)

    def first(self, count: int) -> list[dict]:
        """The first rows as the split has them, the image still encoded."""
        return list(islice(self.encoded, count))

    def __iter__(self) -> Iterator[tuple[int, dict]]:
        count = 0
        for row in islice(self.rows, self.num_rows):
            yield count, row
            count += 1
        if count < self.num_rows:
            raise WrongLength(f"The training split has {count} images, not {self.num_rows}: see `--num_train_images`.")

    def hold(self, batch: list[tuple[int, dict]]) -> list[int]:
        """The indices of a batch, whose rows are then at hand."""
        self.indices, self.batch = zip(*batch, strict=True)
        return list(self.indices)

    def __getitem__(self, index: int) -> dict:
        """A row of the batch in hand, the image still encoded."""
        return self.batch[index - self.indices[0]]

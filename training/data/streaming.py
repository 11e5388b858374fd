"""A training split whose rows are read when they are needed: nothing is downloaded or decoded before."""

from collections.abc import Iterator
from itertools import islice

from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from pyarrow import ArrowException
from torch.utils.data import Sampler


BUFFER_SIZE = 1000


class WrongLength(ValueError):
    """A stream has another number of rows than expected."""


def sound_rows(stream: IterableDataset) -> Iterator[dict]:
    """
    Yield the rows of a stream.

    Raises:
        ValueError: if a file of the stream is damaged or cannot be reached.
    """
    try:
        yield from stream
    except (OSError, ArrowException) as error:  # of connections, too
        raise ValueError(f"The rows of the data set cannot be read: {error}") from error


class StreamedRows(Sampler):
    """
    Rows of a streamed split. In every epoch its shards are shuffled and divided among the processes, and each process
    reads its own, through a buffer of [`BUFFER_SIZE`] rows from which it draws. All of it depends on seed and epoch.

    It has two roles. For the `DataLoader` it is the sampler: it yields pairs (index, row) instead of indices, where
    index is the row's place in the epoch, and the row's image is still encoded. So `DataLoader` and Accelerate divide
    batches among processes, and skip them when a run is resumed, as they do for a split in memory. In the places that
    belong to other processes the row is None. For the data set of that loader it is the rows of the current batch: see
    [`hold`].

    Every process has the same number of rows in an epoch. One whose shards have fewer reads them again from their
    beginning; of one whose shards have more, some rows wait for another epoch.

    Args:
        dataset: the split.
        num_rows: images per epoch; by default, as many as the split says it has.
        seed: seed of the run.
        batch_size: rows per step, of all processes together.
        process, num_processes: number of this process from 0, and how many there are.

    Raises:
        ValueError: if the split does not say how many images it has, and `num_rows` is not given; or if its shards
            cannot be divided equally.
    """

    def __init__(
        self,
        dataset: IterableDataset,
        num_rows: int | None,
        seed: int,
        batch_size: int = 1,
        process: int = 0,
        num_processes: int = 1,
    ):
        if num_rows is None:
            known = (dataset.info.splits or {}).get(str(dataset.split))
            num_rows = known and known.num_examples
        if not num_rows:
            raise ValueError("The data set does not say how many images it has: give `--num_train_images`.")
        if dataset.num_shards % num_processes:
            raise ValueError(
                f"{num_processes} processes cannot share the {dataset.num_shards} shards (files) of the training "
                "split equally: start a number of processes that divides it, write as many files, or leave out "
                "`--streaming`."
            )
        self.features = dataset.features
        self.num_rows = num_rows
        self.process, self.num_processes = process, num_processes
        self.share = batch_size // num_processes
        self.encoded = dataset.decode(False)
        shuffled = self.encoded.shuffle(seed=seed, buffer_size=BUFFER_SIZE)
        self.rows = split_dataset_by_node(shuffled, process, num_processes)

    def __len__(self) -> int:
        return self.num_rows

    def set_epoch(self, epoch: int):
        """Set the epoch that the order depends on."""
        self.rows.set_epoch(epoch)

    def first(self, count: int) -> list[dict]:
        """The first rows in the order of the split, with images still encoded."""
        return list(islice(sound_rows(self.encoded), count))

    def __iter__(self) -> Iterator[tuple[int, dict | None]]:
        rows = self.read()
        for index in range(self.num_rows):
            belongs_to = index // self.share % self.num_processes
            yield index, next(rows) if belongs_to == self.process else None

    def read(self) -> Iterator[dict]:
        """
        The rows of this process; of several processes, again and again.

        Raises:
            WrongLength: in a single process, after the last row.
            ValueError: if there is no row, or a file is damaged.
        """
        count = 0
        while True:
            before = count
            for row in sound_rows(self.rows):
                yield row
                count += 1
            if self.num_processes == 1:
                raise WrongLength(
                    f"The training split has {count} images, not {self.num_rows}: see `--num_train_images`."
                )
            if count == before:
                raise ValueError(f"The shards of process {self.process} have no image: write fewer files.")

    def hold(self, batch: list[tuple[int, dict]]) -> list[int]:
        """Keep the rows of a batch for [`__getitem__`], and return their indices."""
        self.indices, self.batch = zip(*batch, strict=True)
        return list(self.indices)

    def __getitem__(self, index: int) -> dict:
        """The row of that index, which is in the current batch, with its image still encoded."""
        return self.batch[index - self.indices[0]]

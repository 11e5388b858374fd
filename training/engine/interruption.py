"""What ends a run before its time: signals, the death of its launcher or of a worker, and what users can mend."""

import errno
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader


LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # by `accelerate launch`, by torchrun
FAILED = 1  # exit status of a script that ends with a sentence
WRITING_ERRORS = (errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC, errno.EROFS)


@contextmanager
def exit_with_a_sentence():
    """
    For the whole of a script: a ValueError, or a disk that takes no more, ends it with one sentence and status 1;
    Ctrl-C outside of the training with one line and status 130.
    """
    script = Path(sys.argv[0]).name
    try:
        yield
    except ValueError as error:
        sys.exit(f"{script}: {' '.join(str(error).split())}")
    except OSError as error:
        if error.errno not in WRITING_ERRORS:
            raise
        sys.exit(f"{script}: {error.filename or 'A file'} cannot be written: {error.strerror}.")
    except KeyboardInterrupt:
        print(f"{script}: Interrupted.", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


class StopRequest:
    """
    SIGTERM, SIGINT, or the death of the launcher if there is one, as a wish to stop before the next step.

    As a context it takes the signals, and gives them back at its end.
    """

    def __init__(self):
        self.received = None
        self.launcher = os.getppid() if any(name in os.environ for name in LAUNCHED) else None

    def __enter__(self) -> "StopRequest":
        self.replaced = {number: signal.signal(number, self.on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self.replaced.items():
            signal.signal(number, handler)

    def on_signal(self, number: int, _):
        self.received = self.received or number

    @property
    def status(self) -> int:
        """The exit status that was asked for, 128 and the signal's number; 0 when none was."""
        if self.received is not None:
            return 128 + self.received
        return 128 + signal.SIGTERM if self.launcher not in (None, os.getppid()) else 0


def common_status(accelerator: Accelerator, status: int) -> int:
    """The largest exit status of all processes, which every process gets; 0 when all of them want to go on."""
    if accelerator.num_processes == 1:
        return status
    return int(accelerator.gather(torch.tensor([status], device=accelerator.device)).max())


def outlive_interruption(worker: int):
    """
    A worker goes on when all processes of a run are asked to stop, as clusters and Ctrl-C do: the step in hand needs
    its batch. Its parent can still end it, as at the end of a run. (SIGTERM ends it where the sender cannot be told:
    macOS.)
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def read_batches(loader: DataLoader) -> Iterator[dict[str, torch.Tensor]]:
    """
    The batches of a dataloader.

    Raises:
        ValueError: a worker raised one, which PyTorch buries in a traceback; or a worker was killed.
    """
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except ValueError as error:
            if not str(error).startswith("Caught"):
                raise
            raise ValueError(re.sub(r"^[\w.]+: ", "", str(error).splitlines()[-1])) from error
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise ValueError(
                "A process that loads images was killed, as happens where memory runs out: lower `--num_workers`."
            ) from error
        # PyTorch's handler, which is there from the first batch on, raises wherever the main process is when a worker
        # dies, in the middle of the optimiser's step too. Without it the next batch tells.
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        yield batch

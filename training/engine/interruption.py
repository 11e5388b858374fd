"""How a script ends early: on a signal, when its launcher or a worker dies, or on an error that users can mend."""

import errno
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader


LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # set by `accelerate launch`, by torchrun
LAST_TURN = 0.3  # seconds
FAILED = 1  # exit status of a script that ends with a sentence
WRITING_ERRORS = (errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC, errno.EROFS)


@contextmanager
def exit_with_a_sentence():
    """
    End the script with one sentence and status 1 on a ValueError or when a file cannot be written, and with one line
    and status 130 on Ctrl-C (during training, [`StopRequest`] takes Ctrl-C).
    """
    script = Path(sys.argv[0]).name
    threading.excepthook = print_thread_error
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
    finally:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            # When the interpreter ends, PyTorch waits for the thread of the last exchange between processes, and holds
            # the interpreter's lock meanwhile. The thread may need the lock to free its tensors: it gets it now.
            time.sleep(LAST_TURN)


def print_thread_error(failure: threading.ExceptHookArgs):
    """
    Print the error that ended a thread, unless the thread could not write a file: then TensorBoard raises the error in
    the main thread too.
    """
    if not (isinstance(failure.exc_value, OSError) and failure.exc_value.errno in WRITING_ERRORS):
        threading.__excepthook__(failure)


class StopRequest:
    """
    Whether the run should stop before its next step: after SIGTERM, SIGINT, or the death of its launcher.

    It is a context manager that handles the two signals, and restores the former handlers at its end.
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
        """Keep the first signal."""
        self.received = self.received or number

    @property
    def status(self) -> int:
        """128 plus the number of the signal, which is the exit status then; 0 if the run should go on."""
        if self.received is not None:
            return 128 + self.received
        return 128 + signal.SIGTERM if self.launcher not in (None, os.getppid()) else 0


def common_status(accelerator: Accelerator, status: int) -> int:
    """The largest exit status of all processes, the same in every process; 0 if all of them should go on."""
    if accelerator.num_processes == 1:
        return status
    return int(accelerator.gather(torch.tensor([status], device=accelerator.device)).max())


def outlive_interruption(worker: int):
    """
    Let a data-loader worker ignore SIGINT, and SIGTERM unless its parent sends it.

    Clusters and Ctrl-C send a signal to all processes of a run. The training process then finishes its step, for which
    it needs its workers; at the end of the run it ends them itself. (On macOS, where the sender of a signal is not
    known, SIGTERM ends a worker.)
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
    Yield the batches of a dataloader.

    Raises:
        ValueError: if a worker raises one (PyTorch puts it into a traceback; this gives its message alone), or a
            worker is killed.
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
        # With the first batch, PyTorch sets a handler that raises as soon as a worker dies, even in the middle of the
        # optimiser's step. Without the handler, reading the next batch raises.
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        yield batch

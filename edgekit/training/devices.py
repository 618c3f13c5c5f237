"""Where training runs: this process's device, and the others beside it. The one file that knows Accelerate.

Started by ``torchrun`` the same command trains on many GPUs or machines: each process takes its share of every batch, and
gradients are averaged (DistributedDataParallel), so the result is that of one process within the noise of batch norms. The
main process scores, keeps the checkpoint and writes; what it finds, the others hear of.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TypeVar

import torch
from torch import nn

from edgekit.errors import DataError, EdgekitError, MissingExtra, UsageError

__all__ = ["Devices"]

T = TypeVar("T")

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h

#: What torch says, as a plain RuntimeError, where a process waits for one that is gone: gloo's words, and NCCL's.
_GONE = ("gloo", "connection closed", "connection reset", "broken pipe", "timed out", "ncclremoteerror")


def _leave() -> None:
    """Close the connections to the other processes and join their threads: one that drops its last tensor while Python ends
    finds no interpreter to tell, and aborts the process. They are joined when nobody holds the group any more."""
    if torch.distributed.is_initialized():
        gc.collect()
        with contextlib.suppress(RuntimeError):
            torch.distributed.destroy_process_group()


@contextlib.contextmanager
def _kept_memory() -> Iterator[None]:
    """A step allocates what the step before it freed. glibc hands pieces of that size back to the system each time and is
    given empty pages again: a seventh of a step at 96 px, more where the machine is busy. Given back at the end.

    The thresholds (mallopt(3)) stay: setting them ends glibc's own tuning of them, so there is no way back to it.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        yield
        return
    # Some versions of glibc take no more than 32 MiB. Without the first the second makes things worse.
    if any(libc.mallopt(_M_MMAP_THRESHOLD, size) for size in (1 << 30, 1 << 25)):
        libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
    try:
        yield
    finally:
        libc.malloc_trim(0)


class Devices:
    """``rank`` of ``world`` processes, ``main`` for the first; ``device`` is this one's. Making another one costs nothing."""

    def __init__(self) -> None:
        self.rank, self.world = 0, 1
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._accelerator = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            try:
                from accelerate import Accelerator
            except ImportError:
                raise MissingExtra("distributed", "accelerate") from None
            # Before there is a group: the defaults of its functions would hold the group for good, and its threads with it.
            importlib.import_module("torch.distributed.nn.functional")
            self._accelerator = Accelerator(cpu=not torch.cuda.is_available())
            atexit.register(_leave)
            self.rank, self.world = self._accelerator.process_index, self._accelerator.num_processes
            self.device = self._accelerator.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def whole(self, batch: int, samples: int) -> int:
        """The batch, rounded down to one that all processes have an equal share of: two samples at least, for batch norms.

        Raises `DataError` where the ``samples`` are too few for that.
        """
        if self.world == 1:
            return min(batch, samples)
        if samples < 2 * self.world:
            raise DataError(f"{samples} samples are too few for {self.world} processes", "start fewer processes")
        return max(min(batch, samples) // self.world, 2) * self.world

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module that steps go through: in one process the module itself."""
        if self._accelerator is None:
            return module
        wrapped: nn.Module = self._accelerator.prepare_model(module)
        return wrapped

    def share(self, value: T) -> T:
        """The main process's ``value``, in every process."""
        if self._accelerator is None:
            return value
        from accelerate.utils import broadcast_object_list

        shared: T = broadcast_object_list([value])[0]
        return shared

    def mean(self, value: float) -> float:
        """The mean of the ``value`` that each process has, in every process."""
        if self._accelerator is None:
            return value
        from accelerate.utils import reduce

        return float(reduce(torch.tensor([value], device=self.device), "mean")[0])

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What the processes do side by side. Where one fails alone it says why, and those that wait for it end with
        `EdgekitError`; torchrun ends whoever is left. Raises `UsageError` for a model that cannot be trained so."""
        try:
            with _kept_memory():
                yield
        except RuntimeError as error:
            if self._accelerator is None:
                raise
            if "Expected to have finished reduction" in str(error):
                raise UsageError(
                    "the model has parameters that its answer does not depend on: many processes cannot average them",
                    "take them out of the model, or train in one process",
                ) from None
            if not any(words in str(error).lower() for words in _GONE):
                raise
            raise EdgekitError(
                "another process of this training has ended", "its error is beside this one; then give the same command again"
            ) from None

    def autocast(self) -> AbstractContextManager[object]:
        """Mixed precision where the device has it: bfloat16 needs no loss scaling. Not on a CPU: measured here it gains
        little on large convolutions and loses on small ones."""
        if self.device.type == "cuda" and torch.cuda.is_bf16_supported():
            return torch.autocast("cuda", torch.bfloat16)
        return contextlib.nullcontext()

"""Where training runs: this process's device, and the others beside it. The one file that knows Accelerate.

Started by ``torchrun`` the same command trains on many GPUs or machines: each process takes its share of every batch, and
gradients are averaged (DistributedDataParallel), so the result is that of one process within the noise of batch norms.
"""

from __future__ import annotations

import contextlib
import os
from contextlib import AbstractContextManager

import torch
from torch import nn

from edgekit.errors import MissingExtra

__all__ = ["Devices"]


class Devices:
    """``rank`` of ``world`` processes, ``main`` for the first; ``device`` is this one's."""

    def __init__(self) -> None:
        self.rank, self.world = 0, 1
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._accelerator = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            try:
                from accelerate import Accelerator
            except ImportError:
                raise MissingExtra("distributed", "accelerate") from None
            self._accelerator = Accelerator(cpu=not torch.cuda.is_available())
            self.rank, self.world = self._accelerator.process_index, self._accelerator.num_processes
            self.device = self._accelerator.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def whole(self, batch: int) -> int:
        """The batch, rounded down to one that all processes have an equal share of."""
        return max(batch // self.world, 1) * self.world

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module that steps go through: in one process the module itself."""
        if self._accelerator is None:
            return module
        wrapped: nn.Module = self._accelerator.prepare_model(module)
        return wrapped

    def share(self, value: float) -> float:
        """The main process's ``value``, in every process."""
        if self._accelerator is None:
            return value
        from accelerate.utils import broadcast

        return float(broadcast(torch.tensor([value], device=self.device))[0])

    def wait(self) -> None:
        """Until every process is here."""
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()

    def autocast(self) -> AbstractContextManager[object]:
        """Mixed precision where the device has it: bfloat16 needs no loss scaling. Not on a CPU: measured here it gains
        little on large convolutions and loses on small ones."""
        if self.device.type == "cuda" and torch.cuda.is_bf16_supported():
            return torch.autocast("cuda", torch.bfloat16)
        return contextlib.nullcontext()

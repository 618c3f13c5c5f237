"""The options of `build` that TensorRT is given beyond the graph: checked against the target before anything is compiled."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from edgekit.errors import UsageError
from edgekit.targets import Target

__all__ = ["Options"]


@dataclass(frozen=True)
class Options:
    """``workspace_mb``: scratch memory in MiB that one kernel may use; None leaves it to TensorRT (all there is)."""

    workspace_mb: int | None = None

    def check(self, target: Target) -> None:
        """Raises `UsageError` for what the target cannot do."""
        if self.workspace_mb is not None:
            _check_workspace(self.workspace_mb, target)

    def decides(self) -> dict[str, Any]:
        """What of this decides the engine, as JSON: part of the cache's key, of the record and of a kit's build.json."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def _check_workspace(workspace_mb: int, target: Target) -> None:
    if workspace_mb < 1:
        raise UsageError(f"--workspace-mb {workspace_mb} leaves no memory", "give 1 or more, or leave it out for no limit")
    if target.memory_gb is not None and workspace_mb > target.memory_gb.value * 1024:
        raise UsageError(
            f"--workspace-mb {workspace_mb} is more than the {target.memory_gb.value:g} GB of {target.name}",
            "give less; a quarter of the memory is plenty",
        )

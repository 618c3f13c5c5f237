"""What differs between images, texts and series: how a sample is read, asked about and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from edgekit.runtime import Model

from .question import Attribution, Float, Question

__all__ = ["Modality", "View"]


class View(NamedTuple):
    """One map to draw. ``title`` is empty where it is the only one; ``detail`` is `Modality.detail`'s."""

    title: str
    heat: Float
    detail: dict[str, Any]


class Modality(Protocol):
    """``suffixes``: what stands for it in a folder. ``methods``: what can explain it. ``advice``: what to give instead."""

    noun: ClassVar[str]
    plural: ClassVar[str]
    task: ClassVar[str]
    suffixes: ClassVar[frozenset[str]]
    advice: ClassVar[str]
    methods: ClassVar[tuple[str, ...]]

    def __init__(self, model: Model) -> None: ...

    def read(self, path: Path) -> list[tuple[str, Any]]:
        """(name within the file, sample); the name is empty where the file is one sample. Raises `DataError`."""

    def question(self, sample: Any, target: int, model: Model | None = None) -> Question:
        """Raises `InputError` where the sample does not fit the model."""

    def detail(self, question: Question, attribution: Attribution) -> dict[str, Any]:
        """What explanation.json says of a map beside its figures."""

    def picture(self, sample: Any, views: Sequence[View], caption: str) -> bytes:
        """PNG bytes."""

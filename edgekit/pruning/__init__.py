"""Structured pruning: whole channels are removed, so the model is really smaller on every backend."""

from .importance import CRITERIA
from .prune import prune

__all__ = ["CRITERIA", "prune"]

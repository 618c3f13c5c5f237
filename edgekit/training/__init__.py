"""Training: `train` makes a bundle from data; `fit` is the loop, which pruning uses too."""

from .fit import FitConfig, fit
from .train import train

__all__ = ["FitConfig", "fit", "train"]

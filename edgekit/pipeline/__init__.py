"""Recipes: a TOML file that composes the stages. A stage runs again only where its options or inputs changed."""

from .recipe import BUILT_IN, Recipe, read_recipe
from .run import pipeline

__all__ = ["BUILT_IN", "Recipe", "pipeline", "read_recipe"]

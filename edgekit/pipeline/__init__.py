"""Recipes: a TOML file that composes the stages. A stage runs again only where its options or inputs changed."""

from .recipe import BUILT_IN, Recipe, built_in_recipes, read_recipe, recipe_file
from .run import pipeline

__all__ = ["BUILT_IN", "Recipe", "built_in_recipes", "pipeline", "read_recipe", "recipe_file"]

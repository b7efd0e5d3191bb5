"""Training: recipes, losses, the loop and the run folder."""

from awnet.training.logging import read_log
from awnet.training.loop import RunResult, train
from awnet.training.losses import LossOptions, LossResult, MTARDWeights, Teachers
from awnet.training.recipes import MTARD, PGDAT, RECIPES, Recipe, Standard, Trades, list_recipes, recipe_for

__all__ = [
    "MTARD",
    "PGDAT",
    "RECIPES",
    "LossOptions",
    "LossResult",
    "MTARDWeights",
    "Recipe",
    "RunResult",
    "Standard",
    "Teachers",
    "Trades",
    "list_recipes",
    "read_log",
    "recipe_for",
    "train",
]

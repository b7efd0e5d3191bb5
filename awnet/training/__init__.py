"""Training: recipes, losses, the training step, runs and their folders."""

from awnet.training.baselines import RDI, AlternatingTrades, Separate
from awnet.training.forward import Phase, Teachers
from awnet.training.logging import read_log
from awnet.training.losses import LossOptions, LossResult, MTARDWeights, Outputs
from awnet.training.presets import PRESETS, Preset, list_recipes, recipe_for
from awnet.training.recipes import GAT, HAT, MART, MTARD, PGDAT, RECIPES, Recipe, Standard, Trades
from awnet.training.step import TrainingStep
from awnet.training.train import RunResult, train

__all__ = [
    "GAT",
    "HAT",
    "MART",
    "MTARD",
    "PGDAT",
    "PRESETS",
    "RDI",
    "RECIPES",
    "AlternatingTrades",
    "LossOptions",
    "LossResult",
    "MTARDWeights",
    "Outputs",
    "Phase",
    "Preset",
    "Recipe",
    "RunResult",
    "Separate",
    "Standard",
    "Teachers",
    "Trades",
    "TrainingStep",
    "list_recipes",
    "read_log",
    "recipe_for",
    "train",
]

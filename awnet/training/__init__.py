"""Training: recipes, losses, the training step, runs and their folders."""

from awnet.training.baselines import RDI, AlternatingTrades, Separate
from awnet.training.forward import Phase, Teachers
from awnet.training.logging import read_log
from awnet.training.losses import LossOptions, LossResult, MTARDWeights, Outputs
from awnet.training.recipes import (
    HAT,
    MTARD,
    PGDAT,
    RECIPES,
    MTARDFast,
    PGDATFast,
    Recipe,
    Standard,
    StandardFast,
    Trades,
    TradesFast,
    list_recipes,
    recipe_for,
)
from awnet.training.step import TrainingStep
from awnet.training.train import RunResult, train

__all__ = [
    "HAT",
    "MTARD",
    "PGDAT",
    "RDI",
    "RECIPES",
    "AlternatingTrades",
    "LossOptions",
    "LossResult",
    "MTARDFast",
    "MTARDWeights",
    "Outputs",
    "PGDATFast",
    "Phase",
    "Recipe",
    "RunResult",
    "Separate",
    "Standard",
    "StandardFast",
    "Teachers",
    "Trades",
    "TradesFast",
    "TrainingStep",
    "list_recipes",
    "read_log",
    "recipe_for",
    "train",
]

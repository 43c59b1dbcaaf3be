"""saq_fx: low-bit networks from any PyTorch model, by sharpness-aware quantization and mixed-precision search."""

from saq_fx.checkpoint import load, policy_of, save
from saq_fx.cost import CostTable, cost_table
from saq_fx.parameters import parameter_groups
from saq_fx.passes.train_saq import TrainSaq
from saq_fx.precision import Budget, Policy, Precision
from saq_fx.prepare import apply_policy, calibrate, prepare_saq
from saq_fx.recipe import Recipe
from saq_fx.report import LayerRow, PrecisionReport, precision_report
from saq_fx.search import search_precision
from saq_fx.search_result import SearchResult
from saq_fx.training import SAQ
from saq_fx.training_recipe import TrainingRecipe, paper_recipe

__all__ = [
    "SAQ",
    "Budget",
    "CostTable",
    "LayerRow",
    "Policy",
    "Precision",
    "PrecisionReport",
    "Recipe",
    "SearchResult",
    "TrainSaq",
    "TrainingRecipe",
    "apply_policy",
    "calibrate",
    "cost_table",
    "load",
    "paper_recipe",
    "parameter_groups",
    "policy_of",
    "precision_report",
    "prepare_saq",
    "save",
    "search_precision",
]

"""Low-rank adapters and their optimizers."""

from jaxopt_lab.lora.adapters import (
    Adapters,
    difference,
    effective,
    init,
    merge,
    shardings,
    unmerge,
)
from jaxopt_lab.lora.config import AdapterSpec, LoraConfig, LoraSpec, resolve
from jaxopt_lab.lora.files import load, save, spec_from_json, spec_to_json
from jaxopt_lab.lora.lora_fa import lora_fa
from jaxopt_lab.lora.loraplus import lora_plus
from jaxopt_lab.lora.lorsum import lorsum
from jaxopt_lab.lora.lorsum_variants import extrapolated_lorsum, projected_lorsum
from jaxopt_lab.lora.options import FactorMetric, LowRankSum
from jaxopt_lab.lora.pairwise import Given, Rule, pairwise
from jaxopt_lab.lora.preconditioned import preconditioned, scale_by_preconditioned
from jaxopt_lab.lora.resize import Resized, fold, grow, prune, select_and_grow, selection
from jaxopt_lab.lora.rest import with_rest
from jaxopt_lab.lora.scaled_lorsum import scaled_lorsum
from jaxopt_lab.lora.side import side
from jaxopt_lab.lora.tap import Tap
from jaxopt_lab.lora.tapped_step import WithSides, loss_beside, with_taps
from jaxopt_lab.lora.taps import joined_taps, value_grad_and_taps
from jaxopt_lab.lora.weight_lora import weight_lora, weight_lora_plus

__all__ = [
    "AdapterSpec",
    "Adapters",
    "FactorMetric",
    "Given",
    "LoraConfig",
    "LoraSpec",
    "LowRankSum",
    "Resized",
    "Rule",
    "Tap",
    "WithSides",
    "difference",
    "effective",
    "extrapolated_lorsum",
    "fold",
    "grow",
    "init",
    "joined_taps",
    "load",
    "lora_fa",
    "lora_plus",
    "lorsum",
    "loss_beside",
    "merge",
    "pairwise",
    "preconditioned",
    "projected_lorsum",
    "prune",
    "resolve",
    "save",
    "scale_by_preconditioned",
    "scaled_lorsum",
    "select_and_grow",
    "selection",
    "shardings",
    "side",
    "spec_from_json",
    "spec_to_json",
    "unmerge",
    "value_grad_and_taps",
    "weight_lora",
    "weight_lora_plus",
    "with_rest",
    "with_taps",
]

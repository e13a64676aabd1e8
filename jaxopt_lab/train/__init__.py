"""The training loop and what it stands on: configuration, mesh, step, checkpoints."""

from jaxopt_lab.train.compare import CompareResult, compare
from jaxopt_lab.train.config.comparison import CompareConfig
from jaxopt_lab.train.config.finetune import FinetuneConfig
from jaxopt_lab.train.config.run import PretrainConfig, from_preset
from jaxopt_lab.train.config.serialize import from_json, to_json
from jaxopt_lab.train.errors import CheckpointError, ConfigError, TrainingError
from jaxopt_lab.train.hooks import Hook, View
from jaxopt_lab.train.run import RunResult, finetune, pretrain
from jaxopt_lab.train.smoothness import fit_run
from jaxopt_lab.train.trained import continue_text, export_run, load_params

__all__ = [
    "CheckpointError",
    "CompareConfig",
    "CompareResult",
    "ConfigError",
    "FinetuneConfig",
    "Hook",
    "PretrainConfig",
    "RunResult",
    "TrainingError",
    "View",
    "compare",
    "continue_text",
    "export_run",
    "finetune",
    "fit_run",
    "from_json",
    "from_preset",
    "load_params",
    "pretrain",
    "to_json",
]

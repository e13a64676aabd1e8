"""The training loop and what it stands on: configuration, mesh, step, checkpoints."""

from jaxopt_lab.train.config import PretrainConfig, from_preset
from jaxopt_lab.train.errors import CheckpointError, ConfigError, TrainingError
from jaxopt_lab.train.pretrain import RunResult, pretrain
from jaxopt_lab.train.serialize import from_json, to_json

__all__ = [
    "CheckpointError",
    "ConfigError",
    "PretrainConfig",
    "RunResult",
    "TrainingError",
    "from_json",
    "from_preset",
    "pretrain",
    "to_json",
]

"""What a run is: dataclasses, one table of choices, one decoder for flags and JSON.

Nothing here touches a device or a file of a run.
"""

from jaxopt_lab.train.config.comparison import CompareConfig
from jaxopt_lab.train.config.finetune import FinetuneConfig
from jaxopt_lab.train.config.optimizers import (
    OPTIMIZERS,
    AdamWConfig,
    DyKAFConfig,
    LionConfig,
    LionMuonConfig,
    MuonConfig,
    OptaxMuonConfig,
    ShampooConfig,
    SignMuonConfig,
    SignumConfig,
    SoapConfig,
)
from jaxopt_lab.train.config.run import PretrainConfig, RunConfig, from_preset
from jaxopt_lab.train.config.schedules import (
    SCHEDULES,
    AdaptiveWarmupConfig,
    ConstantConfig,
    CosineConfig,
    WsdConfig,
)
from jaxopt_lab.train.config.sections import (
    CheckpointConfig,
    DiagnosticsConfig,
    DistributedConfig,
    EvalConfig,
    HeldOutConfig,
    MeshConfig,
)
from jaxopt_lab.train.config.serialize import from_json, to_json

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "AdaptiveWarmupConfig",
    "AdamWConfig",
    "CheckpointConfig",
    "CompareConfig",
    "ConstantConfig",
    "CosineConfig",
    "DiagnosticsConfig",
    "DistributedConfig",
    "DyKAFConfig",
    "EvalConfig",
    "FinetuneConfig",
    "HeldOutConfig",
    "LionConfig",
    "LionMuonConfig",
    "MeshConfig",
    "MuonConfig",
    "OptaxMuonConfig",
    "PretrainConfig",
    "RunConfig",
    "ShampooConfig",
    "SignMuonConfig",
    "SignumConfig",
    "SoapConfig",
    "WsdConfig",
    "from_json",
    "from_preset",
    "to_json",
]

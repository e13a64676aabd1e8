"""Flax NNX transformers, and what optimizers, trainers and meshes need to know about them."""

from jaxopt_lab.models.config import DecoderConfig
from jaxopt_lab.models.cross_entropy import loss, target_nats
from jaxopt_lab.models.decoder import Decoder, Params, apply, bind, init_params
from jaxopt_lab.models.encoder_config import EncoderConfig
from jaxopt_lab.models.forward_only import probe_loss, probe_scores
from jaxopt_lab.models.gguf import gguf_config_of, load_gguf
from jaxopt_lab.models.huggingface import (
    export_huggingface,
    huggingface_config_of,
    load_huggingface,
    matrix_names,
)
from jaxopt_lab.models.huggingface_bert import bert_config_of, load_bert
from jaxopt_lab.models.layout import (
    abstract_params,
    flops_per_token,
    logical_axes,
    matrix_axes,
    parameter_count,
    partition_specs,
    roles,
)
from jaxopt_lab.models.presets import PRESETS
from jaxopt_lab.models.sampling import generate
from jaxopt_lab.models.sharding import BATCH_AXES, OnMesh, Placement, ShardingRules

__all__ = [
    "BATCH_AXES",
    "PRESETS",
    "Decoder",
    "DecoderConfig",
    "EncoderConfig",
    "OnMesh",
    "Params",
    "Placement",
    "ShardingRules",
    "abstract_params",
    "apply",
    "bert_config_of",
    "bind",
    "export_huggingface",
    "flops_per_token",
    "generate",
    "gguf_config_of",
    "huggingface_config_of",
    "init_params",
    "load_bert",
    "load_gguf",
    "load_huggingface",
    "logical_axes",
    "loss",
    "matrix_axes",
    "matrix_names",
    "parameter_count",
    "partition_specs",
    "probe_loss",
    "probe_scores",
    "roles",
    "target_nats",
]

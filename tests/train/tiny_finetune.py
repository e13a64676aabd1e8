"""A model of a few thousand parameters in Hugging Face's layout, and runs that tune it."""

from dataclasses import replace

import jax

from jaxopt_lab import models
from jaxopt_lab.data import TextFiles, TokenizerConfig
from jaxopt_lab.data.tokenizer import make_tokenizer
from jaxopt_lab.models import DecoderConfig
from jaxopt_lab.train.arguments import parse_config
from jaxopt_lab.train.config.finetune import FinetuneConfig

MODEL = DecoderConfig(vocab_size=260, width=16, depth=1, heads=2, hidden=24, context=64)


def write_base(directory, seed=5, model=MODEL):
    """Random weights with a tokenizer of bytes."""
    make_tokenizer(TokenizerConfig("bytes"), ()).save(directory)
    params = models.init_params(model, jax.random.key(seed))
    models.export_huggingface(model, params, directory / "base", directory / "tokenizer.json")
    return str(directory / "base")


def finetune_config(base, text, run_directory, *flags, **changes):
    """As the command line makes it, small."""
    small = (
        "--model.context 16 --steps 6 --batch-size 4 --validation-fraction 0.2 --mesh.data 1 "
        "--eval.every 3 --eval.batches 2 --checkpoint.every-steps 3 --checkpoint.keep-newest 5"
    )
    arguments = ["--model", base, "--task", "text-files", "--task.paths", text, *small.split()]
    arguments += ["--no-tensorboard", *" ".join(flags).split()]
    config = parse_config(arguments, "finetune", FinetuneConfig)
    assert config.corpus == TextFiles((text,))
    return replace(config, run_directory=str(run_directory), **changes)

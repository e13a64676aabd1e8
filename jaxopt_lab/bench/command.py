"""The command line of the benchmarks."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxopt_lab.bench import shapes
from jaxopt_lab.bench.methods import DEFAULT_METHODS
from jaxopt_lab.bench.optimizers import run_optimizers


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one benchmark, prints its table and writes its JSON.

    Args:
      arguments: Words of the command line; those of the process by default.

    Returns:
      The exit status: 2 after a configuration error, which is printed to standard error.
    """
    options = _parser().parse_args(arguments)
    try:
        report = options.run(options)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{report}\n")
    if options.json is not None:
        options.json.write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jaxopt-lab bench", description="Benchmarks.")
    verbs = parser.add_subparsers(title="benchmarks", required=True, metavar="BENCHMARK")
    _add_optimizers(verbs)
    return parser


def _add_optimizers(verbs: Any) -> None:
    parser = _add_verb(verbs, "optimizers", "time optimizer steps on the shapes of a model")
    parser.add_argument(
        "--layout", choices=(*shapes.LAYOUTS, "both"), default="stacked", help="how layers are kept"
    )
    parser.add_argument("--optimizers", default=",".join(DEFAULT_METHODS), metavar="A,B")
    parser.add_argument("--repeats", type=int, default=15, metavar="N", help="rounds")
    parser.add_argument(
        "--seconds", type=float, default=0.1, help="duration of one sample in a round"
    )
    parser.add_argument(
        "--fused-qkv", action="store_true", help="query, key and value as one matrix"
    )
    parser.set_defaults(run=_run_optimizers)


def _run_optimizers(options: argparse.Namespace) -> Any:
    return run_optimizers(
        options.model,
        optimizers=options.optimizers.split(","),
        layouts=shapes.LAYOUTS if options.layout == "both" else (options.layout,),
        repeats=options.repeats,
        seconds_per_round=options.seconds,
        fused_qkv=options.fused_qkv,
        on_progress=_show,
    )


def _add_verb(verbs: Any, name: str, description: str) -> argparse.ArgumentParser:
    parser = verbs.add_parser(
        name,
        help=description,
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default="gpt2-124m", choices=tuple(shapes.SHAPES))
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    return parser


def _show(text: str) -> None:
    sys.stderr.write(f"{text}\n")

"""The command line of the benchmarks."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from jaxopt_lab.bench import shapes
from jaxopt_lab.bench.memory import run_memory
from jaxopt_lab.bench.methods import DEFAULT_METHODS
from jaxopt_lab.bench.optimizers import run_optimizers
from jaxopt_lab.report.progress import to_stderr
from jaxopt_lab.report.storage import local


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one benchmark, prints its table and writes its JSON.

    Args:
      arguments: Words of the command line; those of the process by default.

    Returns:
      The exit status: 2 after a configuration error, which is printed to standard error; 1 if the
      report has a row that failed.
    """
    options = _parser().parse_args(arguments)
    try:
        report = options.run(options)
    except ValueError as error:
        to_stderr(f"error: {error}")
        return 2
    sys.stdout.write(f"{report}\n")
    if options.json is not None:
        options.json.write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
    return int(getattr(report, "failed", False))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jaxopt-lab bench", description="Benchmarks.")
    verbs = parser.add_subparsers(title="benchmarks", required=True, metavar="BENCHMARK")
    _add_optimizers(verbs)
    _add_memory(verbs)
    _add_training(verbs)
    _add_collectives(verbs)
    _add_scaling(verbs)
    _add_pod(verbs)
    _add_dynamics(verbs)
    _add_adapter_memory(verbs)
    _add_fine_tuning(verbs)
    _add_zeroth_order(verbs)
    _add_low_rank(verbs)
    return parser


def _add_optimizers(verbs: Any) -> None:
    parser = _add_verb(verbs, "optimizers", "time optimizer steps on the shapes of a model")
    parser.add_argument(
        "--layout", choices=(*shapes.LAYOUTS, "both"), default="stacked", help="how layers are kept"
    )
    parser.add_argument("--optimizers", default=",".join(DEFAULT_METHODS), metavar="A,B")
    parser.add_argument("--repeats", type=int, default=11, metavar="N", help="rounds")
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
        on_progress=to_stderr,
    )


def _add_memory(verbs: Any) -> None:
    parser = _add_verb(
        verbs, "memory", "state and scratch memory of optimizer steps, compiled only"
    )
    parser.add_argument("--layout", choices=shapes.LAYOUTS, default="stacked", help="of layers")
    parser.add_argument("--optimizers", default=",".join(DEFAULT_METHODS), metavar="A,B")
    parser.set_defaults(run=_run_memory)


def _run_memory(options: argparse.Namespace) -> Any:
    return run_memory(
        options.model,
        optimizers=options.optimizers.split(","),
        layout=options.layout,
        on_progress=to_stderr,
    )


def _add_training(verbs: Any) -> None:
    parser = _add_verb(verbs, "train", "time training steps of a model on one device")
    parser.add_argument("--optimizer", default="lion_muon_p2", metavar="NAME")
    parser.add_argument("--batch", type=int, default=32, help="sequences a step")
    parser.add_argument("--context", type=int, help="tokens a sequence; default: the model's")
    parser.add_argument("--steps", type=int, default=20, help="steps a round")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 on GPU")
    parser.add_argument("--loop", choices=("unrolled", "scanned"), default="unrolled")
    parser.add_argument("--remat", choices=("none", "full", "dots"), default="none")
    parser.add_argument("--head-chunks", type=int, default=1, help="pieces of the head")
    parser.add_argument("--peak-tflops", type=float, help="data-sheet rate, for a second MFU")
    parser.add_argument("--peers", metavar="torch", help="also time the step of PyTorch")
    parser.set_defaults(run=_run_training)


def _run_training(options: argparse.Namespace) -> Any:
    # Imported here: it needs flax, which the optimizer benchmark must do without.
    from jaxopt_lab.bench.training import run_training

    return run_training(
        options.model,
        optimizer=options.optimizer,
        batch=options.batch,
        context=options.context,
        steps=options.steps,
        compute_dtype=options.dtype,
        loop=options.loop,
        remat=options.remat,
        head_chunks=options.head_chunks,
        peak_tflops=options.peak_tflops,
        peers=options.peers.split(",") if options.peers else (),
        on_progress=to_stderr,
    )


def _add_collectives(verbs: Any) -> None:
    parser = _add_verb(verbs, "collectives", "count the collectives of optimizer steps on a mesh")
    parser.add_argument(
        "--mesh", type=_mesh, metavar="AXIS=N,...", help="data, fsdp, tensor; default: all on fsdp"
    )
    parser.add_argument("--optimizers", metavar="A,B", help="default: a spectral and a sign step")
    parser.add_argument(
        "--cpu-devices", type=int, metavar="N", help="simulate N devices on the CPU"
    )
    parser.set_defaults(run=_run_collectives)


def _run_collectives(options: argparse.Namespace) -> Any:
    _divide_cpu(options.cpu_devices)
    from jaxopt_lab.bench import collective_counts

    names = options.optimizers
    return collective_counts.run_collectives(
        options.model,
        mesh=options.mesh,
        optimizers=names.split(",") if names else collective_counts.DEFAULT_METHODS,
        on_progress=to_stderr,
    )


def _add_scaling(verbs: Any) -> None:
    parser = _add_verb(verbs, "scaling", "time training steps at equal batch per device on meshes")
    parser.add_argument("--optimizers", metavar="A,B", help="default: one of every family")
    parser.add_argument("--axes", default="data,fsdp", metavar="A,B", help="among data, fsdp")
    parser.add_argument("--batch-per-device", type=int, default=32, metavar="N", help="sequences")
    parser.add_argument("--context", type=int, help="tokens a sequence; default: the model's")
    parser.add_argument("--steps", type=int, default=20, help="steps a round")
    parser.add_argument(
        "--cpu-devices", type=int, metavar="N", help="divide the CPU into N devices"
    )
    parser.set_defaults(run=_run_scaling)


def _run_scaling(options: argparse.Namespace) -> Any:
    _divide_cpu(options.cpu_devices)
    from jaxopt_lab.bench import scaling

    names = options.optimizers
    return scaling.run_scaling(
        options.model,
        optimizers=names.split(",") if names else scaling.DEFAULT_METHODS,
        axes=options.axes.split(","),
        batch_per_device=options.batch_per_device,
        context=options.context,
        steps=options.steps,
        on_progress=to_stderr,
    )


def _add_pod(verbs: Any) -> None:
    description = "compile training steps for TPU pods without one, and predict their time"
    parser = verbs.add_parser("pod", help=description, description=description)
    parser.add_argument("--models", metavar="A,B", help="default: gpt2-720m,llama-7b")
    parser.add_argument(
        "--methods", metavar="A,B", help="default: one of every family; lora and mezo also"
    )
    parser.add_argument(
        "--targets", metavar="A,B", help="default: v5e:8x8,v5e:16x16,cpu:512; also v5p, v6e"
    )
    parser.add_argument(
        "--mesh", type=_mesh, metavar="AXIS=N,...", help="data, fsdp, tensor, probe; all on fsdp"
    )
    parser.add_argument("--batch-per-device", type=int, metavar="N", help="8; 1 for llama-7b")
    parser.add_argument("--context", type=int, help="tokens a sequence; default: the model's")
    parser.add_argument("--remat", choices=("none", "full", "dots"), help="none; full at 7B")
    parser.add_argument(
        "--libtpu", type=Path, metavar="DIR", help="where pip --target put it, if not installed"
    )
    parser.add_argument(
        "--trace-only", action="store_true", help="compile nothing: arguments and products alone"
    )
    parser.add_argument(
        "--results", type=Path, default=Path("pod"), metavar="DIR",
        help="programs and what they need; what is there is not compiled again (default: pod)",
    )  # fmt: skip
    _add_json(parser)
    parser.set_defaults(run=_run_pod)


def _run_pod(options: argparse.Namespace) -> Any:
    from jaxopt_lab.bench import pod

    lists = {"names": options.models, "methods": options.methods, "targets": options.targets}
    return pod.run_pod(
        **{name: given.split(",") for name, given in lists.items() if given},
        mesh=options.mesh,
        batch_per_device=options.batch_per_device,
        context=options.context,
        remat=options.remat,
        results=options.results,
        libtpu=options.libtpu,
        compiles=not options.trace_only,
        on_progress=to_stderr,
    )


def _add_dynamics(verbs: Any) -> None:
    description = "time the ensembles of SGD and the loops of repeated learning"
    parser = verbs.add_parser("dynamics", help=description, description=description)
    parser.add_argument("--only", choices=("loop", "ensemble"), help="default: both")
    parser.add_argument(
        "--cpu-devices", type=int, metavar="N", help="divide the CPU into N devices: one a core"
    )
    _add_json(parser)
    parser.set_defaults(run=_run_dynamics)


def _run_dynamics(options: argparse.Namespace) -> Any:
    _divide_cpu(options.cpu_devices)
    from jaxopt_lab.bench.dynamics import run_dynamics

    return run_dynamics(options.only, on_progress=to_stderr)


def _add_adapter_memory(verbs: Any) -> None:
    description = "memory of fine-tuning steps with adapters, by their number, rank and place"
    parser = verbs.add_parser("adapter-memory", help=description, description=description)
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="rows a step")
    parser.add_argument("--length", type=int, default=128, metavar="N", help="tokens a row")
    _add_json(parser)
    parser.set_defaults(run=_run_adapter_memory)


def _run_adapter_memory(options: argparse.Namespace) -> Any:
    from jaxopt_lab.bench.adapter_memory import run_adapter_memory

    return run_adapter_memory(batch=options.batch, length=options.length, on_progress=to_stderr)


def _add_fine_tuning(verbs: Any) -> None:
    description = "time fine-tuning steps: full, with adapters, on a packed base, by LoRSum"
    parser = verbs.add_parser("fine-tuning", help=description, description=description)
    parser.add_argument(
        "--only", choices=("decoder", "encoder"), help="default: both; CPU: encoder"
    )
    parser.add_argument("--rounds", type=int, default=11, metavar="N", help="samples of each step")
    parser.add_argument("--seconds", type=float, default=0.3, help="duration of one sample")
    _add_json(parser)
    parser.set_defaults(run=_run_fine_tuning)


def _run_fine_tuning(options: argparse.Namespace) -> Any:
    from jaxopt_lab.bench.fine_tuning import run_fine_tuning

    return run_fine_tuning(
        options.only and [options.only],
        rounds=options.rounds,
        seconds_per_round=options.seconds,
        on_progress=to_stderr,
    )


def _add_zeroth_order(verbs: Any) -> None:
    description = "time zero-order steps against the forward passes that they consist of"
    parser = verbs.add_parser("zeroth-order", help=description, description=description)
    parser.add_argument("--model", choices=tuple(shapes.SHAPES), help="default: 124M, CPU: tiny")
    parser.add_argument("--batch", type=int, help="sequences; default: 16, CPU: 4")
    parser.add_argument("--context", type=int, help="tokens a sequence; default: 512, CPU: 128")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 on GPU")
    parser.add_argument("--rows", metavar="A;B", help="names from the first column; default: all")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="rounds")
    _add_json(parser)
    parser.set_defaults(run=_run_zeroth_order)


def _run_zeroth_order(options: argparse.Namespace) -> Any:
    from jaxopt_lab.bench.zeroth_order import run_zeroth_order

    return run_zeroth_order(
        options.model,
        batch=options.batch,
        context=options.context,
        compute_dtype=options.dtype,
        rows=options.rows and [name.strip() for name in options.rows.split(";")],
        repeats=options.repeats,
        on_progress=to_stderr,
    )


def _add_low_rank(verbs: Any) -> None:
    description = "time zero-order probes of low rank against batched inference and dense probes"
    parser = _add_verb(verbs, "low-rank", description)
    parser.add_argument("--losses", type=int, default=64, metavar="N", help="evaluated in a step")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="sequences a loss")
    parser.add_argument("--tokens", type=int, default=48, metavar="N", help="of a sequence")
    parser.add_argument("--rank", type=int, default=1, metavar="N", help="of the directions")
    parser.add_argument("--chunk", type=int, metavar="N", help="directions at once; None: all")
    parser.add_argument("--loop", choices=("scanned", "unrolled"), default="scanned")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.set_defaults(run=_run_low_rank)


def _run_low_rank(options: argparse.Namespace) -> Any:
    from jaxopt_lab.bench.low_rank import run_low_rank
    from jaxopt_lab.models import PRESETS

    config = replace(PRESETS[options.model], loop=options.loop, compute_dtype=options.dtype)
    names = ("losses", "batch", "tokens", "rank", "chunk")
    sizes = {name: getattr(options, name) for name in names}
    return run_low_rank(config, **sizes, on_progress=to_stderr)


def _divide_cpu(devices: int | None) -> None:
    if devices is not None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices)


def _mesh(text: str) -> dict[str, int]:
    try:
        return {name: int(size) for name, size in (part.split("=") for part in text.split(","))}
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected, say, data=2,fsdp=4") from error


def _add_verb(verbs: Any, name: str, description: str) -> argparse.ArgumentParser:
    parser = verbs.add_parser(
        name,
        help=description,
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default="gpt2-124m", choices=tuple(shapes.SHAPES))
    _add_json(parser)
    return parser


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=local, metavar="FILE", help="also write the results here")

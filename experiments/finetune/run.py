"""Fine-tunes MiniLM by every method and writes results/METHOD/*.json; README.md has the protocol.

python experiments/finetune/run.py --scale gpu && python experiments/finetune/report.py
"""

import argparse
import json
import os
import pathlib
import time
from typing import Any

import jax
import numpy as np
from inputs import Inputs, fetched, load, save
from methods import METHODS, Method
from program import Lane, Scale, lane, program, test_rows

from jaxopt_lab.report.files import write_result

HERE = pathlib.Path(__file__).parent
SCALES = {
    "gpu": Scale(750, 10, 32, 5, 10, None),
    # A trial of the machinery; it decides nothing.
    "cpu": Scale(24, 2, 8, 1, 2, 64),
}
TUNING_SEED, TUNING_FOLD = 0, 0


def main() -> None:
    """Tunes and runs the methods that have no result yet, program by program."""
    args = arguments()
    # Decompositions side by side can block a CPU of few cores; CHANGELOG.md, known limits.
    os.environ.setdefault("PJRT_NPROC", "16")
    scale = SCALES[args.scale]
    if args.save_inputs:
        save(fetched(), args.save_inputs)
        return
    inputs = load(args.inputs) if args.inputs else fetched()
    out = args.out or HERE / ("results" if args.scale == "gpu" else "trial")
    out.mkdir(parents=True, exist_ok=True)
    programs: dict[Any, Any] = {}
    for method in METHODS:
        if method.name not in args.methods:
            continue
        if method.program not in programs:
            programs[method.program] = program(scale, inputs, method)
        train(scale, inputs, method, programs[method.program], out / method.slug)


def train(
    scale: Scale, inputs: Inputs, method: Method, compiled: Any, directory: pathlib.Path
) -> None:
    """All runs of a method: the rates, then the folds at the best rate."""
    rates = method.rates if scale.rows is None else method.rates[1:4:2]
    cells = [(f"rate-{rate:g}", rate, TUNING_FOLD, TUNING_SEED, False) for rate in rates]
    run(scale, inputs, method, compiled, directory, cells)
    best = best_rate(directory)
    cells = [(f"fold-{fold}", best, fold, 1 + fold, True) for fold in range(scale.folds)]
    run(scale, inputs, method, compiled, directory, cells)


def best_rate(directory: pathlib.Path) -> float:
    """The rate whose best checkpoint has the lowest loss on the validation part."""
    found = [json.loads(path.read_text()) for path in directory.glob("rate-*.json")]
    return min(found, key=lowest)["rate"]


def run(
    scale: Scale,
    inputs: Inputs,
    method: Method,
    compiled: Any,
    directory: pathlib.Path,
    cells: list[tuple[str, float, int, int, bool]],
) -> None:
    """The runs that have no file yet, `lanes` at a time; places left over repeat the last one."""
    directory.mkdir(parents=True, exist_ok=True)
    wanted = [cell for cell in cells if not (directory / f"{cell[0]}.json").exists()]
    for begin in range(0, len(wanted), scale.lanes):
        group = wanted[begin : begin + scale.lanes]
        filled = group + group[-1:] * (scale.lanes - len(group))
        lanes = [lane(scale, inputs, method, *cell[1:]) for cell in filled]
        before = time.perf_counter()
        found = jax.device_get(compiled(Lane(*(np.stack(x) for x in zip(*lanes, strict=True)))))
        seconds = time.perf_counter() - before
        for number, cell in enumerate(group):
            result = outcome(scale, inputs, cell, {k: x[number] for k, x in found.items()})
            result["kept"] = lanes[number].kept.tolist() if method.random else None
            result |= {"seconds_of_group": round(seconds, 2), "lanes": scale.lanes, **machine()}
            path = directory / f"{cell[0]}.json"
            write_result(path, {"method": method.name, **result})
        losses = " ".join(f"{x.min():.4f}" for x in found["validation_loss"][: len(group)])
        print(f"{method.name}: {group[0][0]} ... {losses}, {seconds:.0f} s", flush=True)


def outcome(
    scale: Scale, inputs: Inputs, cell: tuple[str, float, int, int, bool], found: dict[str, Any]
) -> dict[str, Any]:
    """A run as JSON values; `correct` has a digit for every test row, in the order of ids."""
    _, rate, fold, seed, tested = cell
    result = {"rate": rate, "fold": fold, "seed": seed, "steps": scale.steps}
    names = ("train_loss", "validation_loss", "validation_accuracy", "best_step", "weights")
    result |= {name: found[name].tolist() for name in names if name in found}
    if tested:
        rows = test_rows(scale, inputs, fold)
        right = found["answers"].reshape(-1)[: len(rows)] == inputs.label[rows]
        result["correct"] = "".join("01"[int(x)] for x in right)
        result["majority"] = float(max(inputs.label[rows].mean(), 1 - inputs.label[rows].mean()))
    return result


def machine() -> dict[str, str]:
    """Where this runs."""
    return {"device": jax.devices()[0].device_kind, "jax": jax.__version__}


def lowest(result: dict[str, Any]) -> float:
    """The validation loss of the best checkpoint, infinite where there is none."""
    if not result["best_step"]:
        return float("inf")
    losses = result["validation_loss"]
    return losses[result["best_step"] * len(losses) // result["steps"] - 1]


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [method.name for method in METHODS]
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--methods", nargs="*", default=names, choices=names, metavar="NAME")
    parser.add_argument("--inputs", type=pathlib.Path, help="a file that --save-inputs wrote")
    parser.add_argument("--save-inputs", type=pathlib.Path, help="write weights and rows, and stop")
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "results")
    return parser.parse_args()


if __name__ == "__main__":
    main()

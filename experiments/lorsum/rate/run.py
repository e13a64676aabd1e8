"""Accuracy of scaled LoRSum and LoRA over three decades of rates; README.md has the protocol.

python experiments/lorsum/rate/run.py --inputs FILE && python experiments/lorsum/rate/report.py
"""

import argparse
import os
import pathlib
import sys

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "finetune"))

from inputs import fetched, load  # noqa: E402
from methods import Method  # noqa: E402
from program import Scale, program  # noqa: E402
from rates import COMPARED, FOLDS  # noqa: E402
from run import run  # noqa: E402

SCALES = {
    "gpu": Scale(750, 10, 32, 7, 10, None),
    # A trial of the machinery; it decides nothing.
    "cpu": Scale(8, 2, 8, 1, 10, 32),
}


def main() -> None:
    """Runs what has no result yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--inputs", type=pathlib.Path, help="of experiments/finetune/run.py")
    parser.add_argument("--out", type=pathlib.Path, help="default: results, of a trial trial")
    args = parser.parse_args()
    # Decompositions side by side can block a CPU of few cores; CHANGELOG.md, known limits.
    os.environ.setdefault("PJRT_NPROC", "16")
    scale = SCALES[args.scale]
    inputs = load(args.inputs) if args.inputs else fetched()
    out = args.out or HERE / ("results" if args.scale == "gpu" else "trial")
    wanted = {method: cells_of(scale, method) for method in COMPARED}
    missing = sum(
        not (out / method.slug / f"{name}.json").exists()
        for method, groups in wanted.items()
        for group in groups
        for name, *_ in group
    )
    print(f"{missing} runs of {scale.steps} steps are missing, {scale.lanes} at a time", flush=True)
    for method, groups in wanted.items():
        compiled = program(scale, inputs, method)
        for group in groups:
            run(scale, inputs, method, compiled, out / method.slug, group)


def cells_of(scale: Scale, method: Method) -> list[list[tuple[str, float, int, int, bool]]]:
    """The runs of a method: those of one fold side by side."""
    rates = method.rates if scale.rows is None else method.rates[3:4]
    return [
        [(f"fold-{fold}-rate-{rate:g}", rate, fold, seed, True) for rate in rates]
        for fold, seed in FOLDS.items()
    ]


if __name__ == "__main__":
    main()

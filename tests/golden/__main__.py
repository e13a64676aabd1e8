"""`python -m tests.golden DIRECTORY [--only NAME]`: replay reference trajectories."""

import argparse
import os
import sys
from pathlib import Path

# The low-precision references were recorded on a CPU, and 64-bit mode is fast there alone.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from tests.golden.harness import replay_directory


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.add_argument("directory", type=Path, help="golden root or a family's folder")
    parser.add_argument("--only", default="", help="a family, or a part of family/name")
    args = parser.parse_args(argv)
    if not args.directory.is_dir():
        parser.error(f"{args.directory} is not a directory")
    passed = replay_directory(
        args.directory, args.only, report=lambda line: print(line, flush=True)
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())

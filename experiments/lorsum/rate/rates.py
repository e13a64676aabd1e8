"""The methods, rates and folds of this experiment."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "finetune"))

from methods import Method  # noqa: E402

FOLDS = {7: 17, 8: 18, 9: 19}  # with their seeds
ADAMW = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
COMPARED = (
    Method("scaled LoRSum", "projected", (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)),
    Method("LoRA", "adapters", ADAMW),
    Method("LoRA, head 1e-3", "adapters", ADAMW, head_apart=True),
)

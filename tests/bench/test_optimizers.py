import itertools
import json
import subprocess
import sys

import pytest

from jaxopt_lab.bench import run_optimizers, shapes
from jaxopt_lab.bench.command import main
from jaxopt_lab.bench.methods import DEFAULT_METHODS, method
from jaxopt_lab.bench.timing import OptimizerTimer

FEW = {"repeats": 2, "seconds_per_round": 1e-4}


def test_every_optimizer(toy):
    report = run_optimizers(toy, **FEW)
    rows = {row.optimizer: row for row in report.rows}
    assert tuple(rows) == DEFAULT_METHODS
    for row in report.rows:
        assert row.step_ms > 0 and row.worst_step_ms > 0 and row.compile_s > 0
        floor = max(row.byte_floor_ms, row.flop_floor_ms)
        assert row.floor_fraction == pytest.approx(floor / row.step_ms)
    assert rows["adamw"].ratio == 1.0
    # One buffer against two, and a counter each.
    assert 2 * (rows["lion"].state_bytes - 4) == rows["adamw"].state_bytes - 4
    spectral = rows["lion_muon_p1"].flop_floor_ms
    assert spectral == pytest.approx(5 * rows["lion_muon_p5"].flop_floor_ms) and spectral > 0
    assert rows["lion_muon_pinf"].flop_floor_ms == 0.0
    # The warm-up has nine scalars and no products.
    plain, adaptive = rows["lion_muon_p2"], rows["lion_muon_p2_adaptive"]
    assert adaptive.state_bytes == plain.state_bytes + 9 * 4
    assert adaptive.flop_floor_ms == plain.flop_floor_ms
    text = str(report)
    assert all(name in text for name in DEFAULT_METHODS) and "GB/s" in text


def test_both_layouts_and_the_baseline_that_is_always_there(toy):
    report = run_optimizers(toy, optimizers=["lion"], layouts=shapes.LAYOUTS, **FEW)
    names = [(row.optimizer, row.layout) for row in report.rows]
    expected = itertools.product(shapes.LAYOUTS, ("adamw", "lion"))
    assert names == [(name, layout) for layout, name in expected]
    stacked, per_layer = report.rows[1], report.rows[3]
    assert stacked.state_bytes == per_layer.state_bytes
    assert stacked.byte_floor_ms == per_layer.byte_floor_ms


class CountingStep:
    """Stands for a compiled step; records the position in the period at which steps begin."""

    def __init__(self):
        self.compiled = lambda params, state, grads: (params, state + 1)

    def init(self, params):
        return 0


@pytest.mark.parametrize("period", [1, 2, 5])
def test_samples_cover_whole_periods(period):
    timer = OptimizerTimer(CountingStep(), period, None)
    timer.warm_up(None, [None], seconds_per_round=1e-4)
    for _ in range(3):
        timer.round(None, [None])
        assert timer._state % period == 0
    assert [len(single) for single in timer.single] == [period] * 3
    timer.single = [[1.0] * period, [1.0] * (period - 1) + [4.0], [1.0] * (period - 1) + [3.0]]
    assert timer.worst_step() == 3.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "gpt5"}, "model: 'gpt5'"),
        ({"optimizers": ["adamw", "sgd"]}, "optimizer: 'sgd'"),
        ({"optimizers": ["lion_muon_p0"]}, "optimizer: 'lion_muon_p0'"),
        ({"layouts": ["rows"]}, r"layouts: \['rows'\]"),
        ({"repeats": 0}, "repeats: got 0"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        run_optimizers(**{"model": "tiny", **arguments})


def test_periods():
    assert [method(f"lion_muon_p{p}").period for p in ("1", "7", "inf")] == [1, 7, 1]


def test_the_command_writes_its_table_and_its_json(toy, tmp_path, capsys):
    path = tmp_path / "out.json"
    words = f"optimizers --model toy --optimizers lion --repeats 1 --seconds 1e-4 --json {path}"
    assert main(words.split()) == 0
    assert "lion" in capsys.readouterr().out
    result = json.loads(path.read_text())
    assert [row["optimizer"] for row in result["rows"]] == ["adamw", "lion"]
    assert result["device"] == "8 x cpu" and result["versions"]["jax"]
    assert result["ceilings"]["bytes_per_second"] > 0
    assert main(["optimizers", "--model", "toy", "--optimizers", "sgd"]) == 2
    assert "error: optimizer: 'sgd'" in capsys.readouterr().err


_WITHOUT_OTHER_PACKAGES = """
import sys

class Missing:
    names = {"flax", "orbax", "grain", "tensorflow_datasets", "importlib_resources", "tyro", "rich",
             "matplotlib", "tokenizers", "safetensors", "tensorboardX", "equinox"}
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
from jaxopt_lab.bench import floors, shapes
from jaxopt_lab.bench.command import main
floors._CPU_SIZES = (1 << 16, 32)
shapes.SHAPES["toy"] = shapes.DecoderShape(64, 16, 2, 16)
options = "--optimizers lion_muon_p1 --repeats 1 --seconds 1e-4"
sys.exit(main(["optimizers", "--model", "toy", *options.split()]))
"""


def test_it_runs_where_only_jax_optax_jaxtyping_and_numpy_are_installed():
    command = [sys.executable, "-c", _WITHOUT_OTHER_PACKAGES]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "lion_muon_p1" in result.stdout

"""The benchmarks that build a model: training steps and collectives."""

import types

import pytest

from jaxopt_lab import models
from jaxopt_lab.bench import training
from jaxopt_lab.bench.collective_counts import run_collectives
from jaxopt_lab.bench.command import main
from jaxopt_lab.bench.scaling import run_scaling
from jaxopt_lab.bench.training import run_training

TOY = models.DecoderConfig(vocab_size=64, width=32, depth=2, heads=2, hidden=32, context=16)


@pytest.fixture
def toy_model(toy, monkeypatch):
    monkeypatch.setitem(models.PRESETS, "toy", TOY)
    return toy


class StandIn:
    """PyTorch, with half a second a step."""

    torch = types.SimpleNamespace(__version__="2.0")

    def __init__(self, *given, **rates):
        pass

    def loss(self):
        return 4.125

    def warm_up(self):
        return 7.0

    def run(self, steps):
        return 0.5

    def peak_bytes(self):
        return 3 << 29


def test_training_throughput(toy_model, monkeypatch):
    monkeypatch.setattr(training, "peer_for", lambda config: None)
    monkeypatch.setattr(training, "TorchTrainer", StandIn)
    given = {"optimizer": "lion", "batch": 2, "steps": 3, "peak_tflops": 1.0, "peers": ["torch"]}
    report = run_training(toy_model, **given)
    assert report.peer.tokens_per_second == 64 and report.peer.step_ms == 500
    ratio, *_ = str(report).splitlines()[-1].split(" x the tokens/s of PyTorch")
    assert float(ratio) == pytest.approx(500 / report.step_ms, abs=1e-3)
    row = str(report).splitlines()[-3].split()
    assert row[1] == "2.0," and [float(cell) for cell in row[3:5]] == [500, 64]
    assert float(row[-1]) == 4.125
    assert report.tokens_per_second == pytest.approx(2 * 16 / (report.step_ms / 1e3))
    flops = report.tokens_per_second * models.flops_per_token(TOY)
    assert report.mfu == pytest.approx(flops / report.ceilings.flops_per_second)
    assert report.mfu_of_peak == pytest.approx(flops / 1e12)
    assert report.optimizer_share == pytest.approx(report.optimizer_ms / report.step_ms)
    assert report.peak_bytes > report.temp_bytes > 0
    assert "tokens/s" in str(report)


def test_collectives_of_a_spectral_step(toy_model):
    report = run_collectives(toy_model, optimizers=["lion_muon_p1"])
    assert report.mesh == {"fsdp": 8}
    (row,) = report.rows
    # At most there and back for each of the four kernels.
    assert row.kind == "all-to-all" and 2 <= row.count <= 8 and row.bytes > 0


def test_a_sign_step_has_no_collectives(toy_model, capsys):
    words = "collectives --model toy --mesh data=2,fsdp=4 --optimizers lion_muon_pinf"
    assert main(words.split()) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == [
        "lion_muon_pinf",
        "none",
        "0",
        "0.000",
    ]


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="mesh: {'fsdp': 3} has 3 devices, there are 8"):
        run_collectives("tiny", mesh={"fsdp": 3})
    with pytest.raises(ValueError, match=r"mesh: \['pipe'\]"):
        run_collectives("tiny", mesh={"pipe": 8})
    with pytest.raises(ValueError, match="model: 'gpt5'"):
        run_training("gpt5")
    with pytest.raises(SystemExit, match="2"):
        main(["collectives", "--mesh", "fsdp"])


def test_scaling_compares_meshes_with_one_device(toy_model):
    report = run_scaling(toy_model, optimizers=["lion_muon_p2"], batch_per_device=1, steps=1)
    alone, data, fsdp = report.rows
    assert [row.mesh for row in report.rows] == ["one device", "data", "fsdp"]
    assert alone.efficiency == 1.0 and alone.collectives == {}
    assert fsdp.efficiency == pytest.approx(alone.step_ms / fsdp.step_ms)
    assert "all-to-all" not in data.collectives and 0 < fsdp.collectives["all-to-all"] <= 8
    assert "efficiency" in str(report)


def test_scaling_refuses_what_it_cannot_time():
    with pytest.raises(ValueError, match="axes: got .'tensor',."):
        run_scaling("tiny", axes=["tensor"])
    with pytest.raises(ValueError, match="steps, batch: got 0, 32"):
        run_scaling("tiny", steps=0)

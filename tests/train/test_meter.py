import json
import time
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from jaxopt_lab import models
from jaxopt_lab.report.tracker import read_metrics
from jaxopt_lab.train.meter import PEAK_TFLOPS, Meter, StartClock, peak_of
from jaxopt_lab.train.run import pretrain
from tests.train.tiny_run import tiny_config, write_text

IMPORTED = time.monotonic()


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_a_step_lasts_from_one_reading_to_the_next_without_what_lies_between():
    clock = Clock()
    meter = Meter(clock)

    def step(seconds, wait=0.0):
        meter.begin()

        def late():
            clock.now += wait
            yield "batch"

        assert meter.next_of(late()) == "batch"
        clock.now += seconds
        measured = meter.step_done()
        assert measured["data_wait_seconds"] == wait
        return measured["step_seconds"]

    assert [step(1.0), step(0.5, wait=0.25), step(2.0)] == [1.0, 0.75, 2.0]
    meter.pause()
    clock.now += 100.0  # an evaluation
    assert [step(1.0), step(1.5)] == [1.0, 1.5]
    assert meter.data_wait_share == 0.25 / (1.0 + 0.75 + 2.0 + 1.0 + 1.5)
    assert Meter(clock).data_wait_share is None


@pytest.mark.parametrize(
    ("kind", "tflops"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("TPU v5", 459.0),
        ("TPU v5 lite", 197.0),
    ],
)
def test_peaks_of_known_devices(kind, tflops):
    assert peak_of(kind) == (tflops, "data sheet, dense bfloat16")
    assert peak_of(kind, stated=1.0) == (1.0, "stated")


@pytest.mark.parametrize(
    "kind", ["cpu", "NVIDIA", "NVIDIA T4", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"]
)
def test_unknown_devices_have_no_peak(kind):
    assert peak_of(kind) is None and kind not in PEAK_TFLOPS


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXOPT_LAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        directory, text = (
            tmp_path_factory.mktemp("runs"),
            write_text(tmp_path_factory.mktemp("text")),
        )
        config = tiny_config(text, directory / "plain")
        pretrain(config)
        stated = replace(config, peak_tflops=1e-3, run_directory=str(directory / "stated"))
        pretrain(stated)
    return stated, *(
        [row for row in read_metrics(directory / name) if "loss" in row]
        for name in ("plain", "stated")
    )


def test_every_step_is_measured(measured):
    config, plain, stated = measured
    for row in plain + stated:
        assert 0 <= row["data_wait_seconds"] < row["step_seconds"]
        assert row["tokens_per_second"] == pytest.approx(4 * 16 / row["step_seconds"])
        assert 0 < row["optimizer_share_of_flops"] < 1
    assert any(row["data_wait_seconds"] > 0 for row in plain)
    assert not any("mfu" in row or "peak_memory_bytes" in row for row in plain)
    flops = 4 * 16 * models.flops_per_token(config.model)
    for row in stated:
        assert row["mfu"] == pytest.approx(flops / row["step_seconds"] / 1e9)
    summary = json.loads(Path(config.run_directory, "summary.json").read_text())
    waited, seconds = (
        sum(row[f"{name}_seconds"] for row in stated) for name in ("data_wait", "step")
    )
    assert summary["data_wait_share"] == pytest.approx(waited / seconds)
    manifest = json.loads(Path(config.run_directory, "manifest.json").read_text())
    assert manifest["sessions"][0]["peak"] == {"tflops": 1e-3, "source": "stated"}


def test_memory_is_that_of_the_fullest_device(monkeypatch):
    class Device:
        def __init__(self, peak):
            self.peak = peak

        def memory_stats(self):
            return self.peak and {"peak_bytes_in_use": self.peak}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device(5), Device(7), Device(None)])
    assert Meter().step_done() == {"peak_memory_bytes": 7}
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(None)])
    assert Meter().step_done() == {}


def test_the_clock_of_a_start_begins_with_the_process(tmp_path, monkeypatch):
    # Packages were imported before.
    begin = time.monotonic()
    since_import = begin - IMPORTED
    clock = StartClock.of_process("import")
    assert since_import + 0.2 < clock.seconds["import"] < since_import + 600
    clock.lap("devices")
    clock.lap("import")
    assert list(clock.seconds) == ["import", "devices"]
    assert clock.seconds["devices"] <= time.monotonic() - begin + 1e-3  # rounded
    # Where there is no such file, the process begins with the clock.
    monkeypatch.setattr("jaxopt_lab.train.meter._PROCESS", tmp_path / "none")
    begin = time.monotonic()
    alone = StartClock.of_process("import").seconds["import"]
    assert alone <= time.monotonic() - begin + 1e-3

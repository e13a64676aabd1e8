import io

import pytest

from jaxopt_lab.report import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def run(progress, clock, steps, seconds_per_step):
    for step in steps:
        clock.now += seconds_per_step
        progress.update(step, loss=2.0, rate=1e-3)


def test_plain_lines_come_every_interval_and_at_the_end():
    stream, clock = io.StringIO(), Clock()
    with Progress(100, stream=stream, interval=5.0, clock=clock) as progress:
        run(progress, clock, range(1, 101), 1.0)
    steps = [int(line.split()[1].split("/")[0]) for line in stream.getvalue().splitlines()]
    assert steps == [*range(1, 101, 5), 100]


def test_speed_and_remaining_time():
    stream, clock = io.StringIO(), Clock()
    progress = Progress(1000, tokens_per_step=8192, stream=stream, interval=0.0, clock=clock)
    run(progress, clock, range(1, 101), 0.5)
    assert progress.steps_per_second() == 2.0
    assert stream.getvalue().splitlines()[-1] == (
        "step 100/1000  loss 2.0000  rate 1.00e-03  16k tokens/s  eta 7:30  500 ms/step"
    )


def test_what_the_run_measures_of_itself():
    stream, clock = io.StringIO(), Clock()
    progress = Progress(
        100, stream=stream, interval=0.0, clock=clock, utilization=0.1, optimizer_share=0.07
    )
    for step in range(1, 11):
        clock.now += 0.25
        progress.update(step, loss=2.0, data_wait=0.05, memory=3 * 2**30)
    assert stream.getvalue().splitlines()[-1] == (
        "step 10/100  loss 2.0000  eta 0:22  mfu 40.0 %  250 ms/step  data 20.0 %  "
        "memory 3.0 GiB  optimizer 7.0 %"
    )
    assert stream.getvalue().splitlines()[0] == "step 1/100  loss 2.0000  memory 3.0 GiB"


@pytest.mark.parametrize(("wait", "told"), [(0.049, False), (0.051, True)])
def test_a_short_wait_for_data_is_not_shown(wait, told):
    stream, clock = io.StringIO(), Clock()
    progress = Progress(100, stream=stream, interval=0.0, clock=clock)
    for step in range(1, 4):
        clock.now += 1.0
        progress.update(step, loss=2.0, data_wait=wait)
    assert ("  data " in stream.getvalue().splitlines()[-1]) == told


def test_an_evaluation_does_not_count_as_training_time():
    clock = Clock()
    progress = Progress(1000, stream=io.StringIO(), clock=clock)
    run(progress, clock, range(1, 11), 0.5)
    clock.now += 60.0
    progress.evaluation(10, {"loss": 2.1})
    run(progress, clock, range(11, 21), 0.5)
    assert progress.steps_per_second() == 2.0


def test_messages_and_evaluations_stand_above_the_live_line():
    stream, clock = Terminal(), Clock()
    with Progress(10, tokens_per_step=10, stream=stream, clock=clock) as progress:
        run(progress, clock, range(1, 6), 0.1)
        progress.message("saved [checkpoints]/5")
        progress.evaluation(5, {"loss": 3.25, "bits/byte": 1.5, "loss_se": 0.125})
        run(progress, clock, range(6, 11), 0.1)
    output = stream.getvalue()
    assert "saved [checkpoints]/5\n" in output
    assert "step 5/10  evaluation  loss 3.2500 ± 0.1250  bits/byte 1.5000\n" in output
    assert output.rindex("loss 2.0000") > output.index("evaluation")


def test_a_narrow_terminal_cuts_off_what_matters_least(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    stream, clock = Terminal(), Clock()
    live = {"utilization": 0.1, "optimizer_share": 0.07, "tokens_per_step": 1000}
    with Progress(300, stream=stream, clock=clock, **live) as progress:
        run(progress, clock, range(1, 30), 0.5)
    last = [line for line in stream.getvalue().splitlines() if "loss" in line][-1]
    assert "step" in last and "29/300" in last and "eta 2:16" in last
    assert "optimizer" not in last

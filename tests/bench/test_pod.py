"""The rehearsal of a pod: what is refused, what is kept, and what a small case needs."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxopt_lab.bench import pod, pod_programs
from jaxopt_lab.bench.command import main
from jaxopt_lab.bench.pod_time import step_time
from jaxopt_lab.bench.product_flops import product_flops
from jaxopt_lab.models import DecoderConfig

TOY = DecoderConfig(vocab_size=64, width=32, depth=2, heads=2, context=16, tied=False)
CASE = pod_programs.Case(
    model="toy",
    method="lion_muon_p2",
    target="cpu:8",
    mesh={"data": 1, "fsdp": 8},
    batch_per_device=1,
    context=16,
    remat="full",
)


def compiled(method):
    case = dataclasses.replace(CASE, method=method)
    return pod_programs.compile_case(case, lambda stage: None)[0]


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(pod_programs.MODELS, "toy", TOY)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "gpt5"], "model: 'gpt5' is not one of"),
        (["--methods", "sgd"], "optimizer: 'sgd' is not one of"),
        (["--targets", "v9:8x8"], "target: 'v9:8x8' is no topology; wanted, say, v5e:8x8"),
        (["--targets", "v5e:8"], "target: 'v5e:8' is no topology"),
        (["--targets", "cpu:0"], "target: 'cpu:0' is no topology"),
        (["--mesh", "fsdp=32"], "mesh: fsdp=32 has 32 devices, v5e:8x8 has 64 chips"),
        (["--mesh", "fsdp=64", "--methods", "mezo"], "has no axis 'probe', which mezo needs"),
        (["--mesh", "probe=64"], "mesh: ['probe'] not among data, fsdp, tensor"),
        (["--batch-per-device", "0"], "batch_per_device: got 0, wanted at least 1"),
        (["--libtpu", "nowhere"], "libtpu, the TPU compiler, is not in nowhere: pip install"),
    ],
)
def test_bad_input_is_named_before_anything_is_compiled(arguments, message, tmp_path, capsys):
    results = tmp_path / "results"
    default = [] if "--targets" in arguments else ["--targets", "v5e:8x8"]
    assert main(["pod", *default, *arguments, "--results", str(results)]) == 2
    assert message in capsys.readouterr().err
    assert not results.exists()


def found(flops, all_to_all):
    exchanges = {"all-to-all": {"count": 8, "bytes": 1.5e8, "sent": all_to_all}}
    gathers = {"all-gather": {"count": 4, "bytes": 3e9, "sent": 2e9}}
    step = {"flops": flops, "collectives": gathers | (exchanges if all_to_all else {})}
    return step


RESULT = {
    "state_bytes": 64e9,
    "argument_bytes": 1e9,
    "output_bytes": 1e9,
    "temp_bytes": 2e9,
    "compile_s": 100.0,
    "cpu_s": 60.0,
    "periodic": found(3e13, 1e8),
    "ordinary": found(1e13, 0),
}


def test_what_is_there_is_not_compiled_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pod, "find_libtpu", lambda directory: pathlib.Path("libtpu.so"))
    monkeypatch.setattr(subprocess, "Popen", lambda *given, **named: pytest.fail("compiled"))
    case = dataclasses.replace(
        CASE, target="v5e:8x8", mesh={"data": 1, "fsdp": 64}, batch_per_device=8, remat="none"
    )
    (tmp_path / f"{case.name}.json").write_text(json.dumps(RESULT))
    arguments = ["pod", "--models", "toy", "--methods", "lion_muon_p2", "--targets", "v5e:8x8"]
    out = tmp_path / "out.json"
    assert main([*arguments, "--results", str(tmp_path), "--json", str(out)]) == 0
    assert "lion_muon_p2  v5e:8x8" in capsys.readouterr().out
    (row,) = json.loads(out.read_text())["rows"]
    # Every second step is spectral, and its exchange goes over four links on average.
    assert row["time"]["compute"] == pytest.approx(2e13 / 197e12)
    assert row["time"]["link"] == pytest.approx((2e9 + 4 * 1e8 / 2) / 200e9)
    assert row["time"]["memory"] == pytest.approx((2e9 + 2 * (3e9 + 1.5e8 / 2)) / 819e9)


# With the links on the way of a byte: in two stages from more than 64 chips on.
TORI = {"v5e:4x4": 2, "v5e:8x8": 4, "v5e:8x16": 3, "v5e:16x16": 4}


def test_resources_are_used_at_once():
    time = step_time(RESULT, "v5p:4x4x4", lambda of: of(RESULT["ordinary"]))
    assert time.compute == 1e13 / 459e12 and time.link == 2e9 / 600e9
    assert time.at_least == max(time)


def test_an_exchange_in_two_stages_takes_the_links_of_one():
    """Each sends all bytes, along one side of the torus."""
    links = {x: step_time(RESULT, x, lambda of: of(found(0, 1e8))).link for x in TORI}
    assert links == pytest.approx({x: (2e9 + TORI[x] * 1e8) / 200e9 for x in TORI})


def test_a_case_that_fails_is_a_row(tmp_path, monkeypatch, capsys):
    case = dataclasses.replace(CASE, batch_per_device=8, remat="none")

    def popen(command, env, stdout, stderr):
        assert env["JAX_ENABLE_COMPILATION_CACHE"] == "false"
        script = "import sys; sys.exit('ValueError: of this case')"
        return REAL([sys.executable, "-c", script], stdout=stdout, stderr=stderr)

    REAL = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", popen)
    arguments = ["pod", "--models", "toy", "--methods", "lion_muon_p2", "--targets", "cpu:8"]
    assert main([*arguments, "--results", str(tmp_path)]) == 1
    log = tmp_path / f"{case.name}.log"
    assert f"{case.name}: ValueError: of this case (all of it in {log})" in capsys.readouterr().out


def test_products_count_where_they_are_done():
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def whole(x):  # on each of four, (2, 8) by (8, 2)
        return jax.shard_map(
            lambda x: x @ x.T, mesh=mesh, in_specs=P("a"), out_specs=P("a"), check_vma=False
        )(x)

    def waits(change):
        return lambda x: jax.lax.while_loop(lambda x: x[0, 0] > 0, change, x)

    def step(x, take):
        x = jax.lax.scan(lambda x, _: (x @ jnp.ones((8, 8)), None), x, None, length=3)[0]
        x = jax.lax.cond(take, lambda x: x @ jnp.ones((8, 8)), lambda x: x, x)
        exact = jnp.matmul(x, x.T, precision="highest")
        # A start, and a refresh with passes of its own.
        x = waits(lambda x: x @ jnp.ones((8, 8)))(x)
        x = waits(lambda x: waits(lambda x: x @ x)(x @ jnp.ones((8, 8)) @ jnp.ones((8, 8))))(x)
        return whole(x), exact

    x = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    jaxpr = jax.make_jaxpr(step)(x, True)
    product = 2 * 8**3 / 8
    least = 3 * product + 6 * product + 2 * 2 * 8 * 2
    assert product_flops(jaxpr, 8, branch=min, rounds=0) == least
    assert product_flops(jaxpr, 8, rounds=0) == least + product
    assert product_flops(jaxpr, 8, branch=min) == least + 3 * product


# Of the toy: two layers of five kernels, a table and a head.
KERNELS = 2 * (32 * 96 + 32 * 32 + 3 * 32 * 128)
TABLES = 2 * 64 * 32
F32 = 4  # to which a CPU widens products, and what is gathered for them
ADAPTERS = 2 * pod_programs.RANK * (3 * 64 + 64 + 3 * 160)


def bytes_of(step):
    return {kind: (total["count"], total["bytes"]) for kind, total in step["collectives"].items()}


def test_a_small_step_keeps_its_budget_of_collectives():
    found = compiled("lion_muon_p2")
    ordinary, spectral = bytes_of(found["ordinary"]), bytes_of(found["periodic"])
    # Kernels are gathered for both passes, gradients summed once a layer; CPUs scatter nothing.
    assert ordinary["all-gather"] == (2 * 2 * 5 + 2, F32 * (2 * KERNELS + TABLES))
    count, size = ordinary["all-reduce"]
    assert count == 4 and 0 <= size - F32 * found["parameters"] < 64
    assert set(ordinary) == {"all-gather", "all-reduce"}
    # Four stacks go to whole matrices and back, each of at most eight: one a device.
    exchanged = 2 * F32 * (2 * 32 * 32 + 2 * 32 * 128)
    assert spectral == ordinary | {"all-to-all": (8, exchanged)}
    # Everything but norms and counters is sharded, which shows before anything is compiled.
    traced, _ = pod_programs.trace_case(CASE, pod_programs.case_mesh(CASE, compiles=False))
    assert traced["argument_bytes"] == pytest.approx(found["argument_bytes"], rel=0.03)
    assert traced["ordinary"]["flops"] == found["ordinary"]["flops"]
    assert found["argument_bytes"] < 1.05 * found["state_bytes"] / 8


def test_beside_a_frozen_base_only_adapters_are_summed():
    found = compiled("lora")["ordinary"]
    _, size = bytes_of(found)["all-reduce"]
    assert 0 <= size - F32 * ADAPTERS < 64


@pytest.mark.slow
def test_probes_on_groups_of_chips():
    mesh = {"probe": 2, "fsdp": 4}
    case = dataclasses.replace(CASE, method="mezo", mesh=mesh)
    traced, _ = pod_programs.trace_case(case, pod_programs.case_mesh(case))
    inner = dataclasses.replace(CASE, method="adamw")
    step, _ = pod_programs.trace_case(inner, pod_programs.case_mesh(inner))
    # Each group takes both sides of its direction over half as many rows: two forward passes where
    # AdamW takes one and a backward pass, with layers recomputed.
    forward = step["ordinary"]["flops"] / 4
    assert traced["ordinary"]["flops"] == pytest.approx(2 * forward, rel=0.1)


def test_an_ordinary_step_of_soap_exchanges_each_array_once():
    # Of four stacks: the gradient and the direction, two moments and two factors both ways, bases.
    found = compiled("soap_f10")["ordinary"]
    assert bytes_of(found)["all-to-all"] == (4 * (2 + 4 + 4 + 2), 712_704)


@pytest.fixture(scope="module")
def libtpu(tmp_path_factory):
    """Directory with the TPU compiler, or None where Python has it."""
    try:
        pod.find_libtpu()
    except ValueError:
        directory = tmp_path_factory.mktemp("libtpu")
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet"]
        command += ["--target", str(directory), pod.wanted_libtpu()]
        installed = subprocess.run(command, capture_output=True, text=True)
        if installed.returncode:
            pytest.skip(f"libtpu cannot be installed here: {installed.stderr.strip()[-200:]}")
        return directory


@pytest.mark.slow
def test_the_tpu_compiler(libtpu, tmp_path):
    report = pod.run_pod(
        ["tiny"],
        methods=["lion_muon_p2"],
        targets=["v5e:4x4"],
        batch_per_device=1,
        results=tmp_path,
        libtpu=libtpu,
    )
    assert not report.failed, str(report)
    (row,) = report.rows
    assert (
        row.found is not None and row.found["argument_bytes"] < 1.1 * row.found["state_bytes"] / 16
    )
    spectral, ordinary = bytes_of(row.found["periodic"]), bytes_of(row.found["ordinary"])
    assert spectral["all-to-all"][0] == 8 and "all-to-all" not in ordinary
    assert ordinary["all-gather"][0] <= 40
    assert row.time is not None and 0 < row.time.at_least < 1e-3

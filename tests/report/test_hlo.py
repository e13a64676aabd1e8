import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxopt_lab.report import collectives


def compiled_text(local, out_specs, shapes=((64, 8),)):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    f = jax.shard_map(local, mesh=mesh, in_specs=P("d"), out_specs=out_specs, check_vma=False)
    abstract = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(f).lower(*abstract).compile().as_text()


# Local block: (8, 8) f32 on each of eight devices, 256 bytes.
PROGRAMS = {
    "all-gather": (lambda x: lax.all_gather(x, "d", tiled=True), P(), 64 * 8 * 4),
    "all-reduce": (lambda x: lax.psum(x, "d"), P(), 8 * 8 * 4),
    "all-to-all": (lambda x: lax.all_to_all(x, "d", 1, 0, tiled=True), P("d"), 8 * 8 * 4),
    "collective-permute": (
        lambda x: lax.ppermute(x, "d", [(i, (i + 1) % 8) for i in range(8)]),
        P("d"),
        8 * 8 * 4,
    ),
    "reduce-scatter": (lambda x: lax.psum_scatter(x, "d", tiled=True), P("d"), 1 * 8 * 4),
}


@pytest.mark.parametrize("kind", PROGRAMS)
def test_compiled_collectives_are_counted_with_their_result_bytes(kind):
    local, out_spec, size = PROGRAMS[kind]
    assert collectives(compiled_text(local, out_spec)) == {kind: (1, size)}


def test_elementwise_work_and_single_device_groups_have_none():
    assert collectives(compiled_text(jnp.sign, P("d"))) == {}
    text = "%r = f32[4] all-reduce(%x), replica_groups={{0},{1},{2}}, to_apply=%add"
    assert collectives(text) == {}
    assert collectives("%r = f32[4] all-reduce(%x), replica_groups=[8,1]<=[8]") == {}


def test_a_collective_inside_a_loop_is_counted_once():
    def local(x):
        return lax.fori_loop(0, 5, lambda _, y: jnp.sin(lax.psum(y, "d")), x)

    assert collectives(compiled_text(local, P("d")))["all-reduce"].count == 1


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "  %s = (f32[4]{0}, f32[32]{0}) all-gather-start(f32[4]{0} %x), dimensions={0}\n"
            "  %d = f32[32]{0} all-gather-done((f32[4]{0}, f32[32]{0}) %s)",
            {"all-gather": (1, 128)},
        ),
        (
            "  s = ((bf16[4], bf16[2]), (bf16[32], bf16[16]), u32[]) all-gather-start(x, y)",
            {"all-gather": (1, 96)},
        ),
        (
            "  ROOT %s = (f32[4]{0:T(8,128)}, /*index=1*/f32[2]{0}) all-reduce-start(%x, %y)",
            {"all-reduce": (1, 24)},
        ),
        (
            "  %s = ((f32[4]{0}, f32[2]{0}), (f32[4]{0}, f32[2]{0})) all-reduce-start(%x, %y)",
            {"all-reduce": (1, 24)},
        ),
        (
            "  %p = (f32[4], f32[4], u32[], u32[]) collective-permute-start(%x)",
            {"collective-permute": (1, 16)},
        ),
        ("  %a = (s8[3], pred[5], f8e4m3fn[2], s4[4]) all-to-all(%x)", {"all-to-all": (1, 12)}),
        (
            '  %f = f32[4] fusion(%all-gather.1, %b), metadata={op_name="x all-gather(y)"}',
            {},
        ),
    ],
)
def test_forms_of_other_backends(line, expected):
    assert collectives(line) == expected


def test_two_of_a_kind_add_up():
    def local(x, y):
        return lax.psum(x, "d"), lax.all_to_all(y, "d", 1, 0, tiled=True), lax.pmax(y, "d")

    text = compiled_text(local, (P(), P("d"), P()), shapes=((64, 8), (8, 16)))
    assert collectives(text) == {"all-reduce": (2, 256 + 64), "all-to-all": (1, 64)}

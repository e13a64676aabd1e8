"""Collectives of one run of a program, on eight devices and in the text of a TPU's compiler."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxopt_lab.report.hlo import collectives
from jaxopt_lab.report.traffic import traffic

# A local block (8, 8) f32 on each of eight devices, 256 bytes.
BLOCK = 8 * 8 * 4


def compiled_text(local, out_spec):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    f = jax.shard_map(local, mesh=mesh, in_specs=P("d"), out_specs=out_spec, check_vma=False)
    return jax.jit(f).lower(jax.ShapeDtypeStruct((64, 8), jnp.float32)).compile().as_text()


def gathered(x):
    return lax.all_gather(x, "d", tiled=True)


def scattered(x):
    return lax.psum_scatter(x, "d", tiled=True)


def exchanged(x):
    return lax.all_to_all(x, "d", 1, 0, tiled=True)


def summed(x):
    return lax.psum(x, "d")


def in_a_loop(x):
    return lax.fori_loop(0, 5, lambda _, y: jnp.sin(summed(y)), x)


def in_a_branch(x):
    return lax.cond(jnp.sum(x) > 0, in_a_loop, lambda x: jnp.cos(summed(x)), x)


@pytest.mark.parametrize(
    ("local", "out_spec", "branch", "wanted"),
    [
        (gathered, P(), max, ("all-gather", 1, 8, 7)),
        (scattered, P("d"), max, ("reduce-scatter", 1, 1 / 8, 7 / 8)),
        (exchanged, P("d"), max, ("all-to-all", 1, 1, 7 / 8)),
        (summed, P(), max, ("all-reduce", 1, 1, 14 / 8)),
        (in_a_loop, P("d"), max, ("all-reduce", 5, 5, 5 * 14 / 8)),
        (in_a_branch, P("d"), max, ("all-reduce", 5, 5, 5 * 14 / 8)),
        (in_a_branch, P("d"), min, ("all-reduce", 1, 1, 14 / 8)),
    ],
)
def test_loops_branches_and_groups_count(local, out_spec, branch, wanted):
    kind, count, blocks, sent = wanted
    found = traffic(compiled_text(local, out_spec), branch=branch)
    assert found == {kind: (count, blocks * BLOCK, sent * BLOCK)}


# A loop of three rounds whose trip count is in its condition alone. In each, a kernel has metadata
# of several lines, one gather is started, carried on and finished by fusions that repeat it, two
# exchanges share a channel, and gradients are summed and cut in one fusion.
TPU_TEXT = """
%start (p: bf16[1,4]) -> (bf16[1,4], bf16[4,4]) {
  %g.1 = bf16[4,4]{1,0:T(8,128)} all-gather(%p), channel_id=7, replica_groups=mesh['axis_0'=1,'axis_1'=4] {'axis_1'}, dimensions={0}
  ROOT %c = (bf16[1,4], bf16[4,4]) custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}

%step (p: bf16[1,4]) -> bf16[4,4] {
  ROOT %g.3 = bf16[4,4]{1,0:T(8,128)} all-gather(%p), channel_id=7, replica_groups=mesh['axis_0'=1,'axis_1'=4] {'axis_1'}, dimensions={0}
}

%done (p: bf16[1,4]) -> bf16[4,4] {
  %g.2 = bf16[4,4]{1,0:T(8,128)} all-gather(%p), channel_id=7, replica_groups=mesh['axis_0'=1,'axis_1'=4] {'axis_1'}, dimensions={0}
  ROOT %c = bf16[4,4] custom-call(%g.2), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.5 (p: f32[8,4]) -> f32[2,4] {
  %r = f32[8,4]{1,0} all-reduce(%p), channel_id=9, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %d = f32[2,4]{1,0} dynamic-slice(%r, %i, %z), dynamic_slice_sizes={2,4}
}

%condition (s: (s32[], f32[8,4])) -> pred[] {
  %bound = s32[]{:T(128)} constant(3)
  ROOT %lt = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

%body (s: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %k = f32[8,4] custom-call(%d), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="kernel"}
  %f.1 = (bf16[1,4], bf16[4,4]) fusion(%a), kind=kCustom, calls=%start
  %f.4 = bf16[4,4]{1,0} fusion(%f.1), kind=kCustom, calls=%step
  %f.2 = bf16[4,4]{1,0} fusion(%f.4), kind=kCustom, calls=%done
  %x.1 = f32[4,4]{1,0} all-to-all(%b), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}
  %x.2 = f32[4,4]{1,0} all-to-all(%c), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %f.3 = f32[2,4]{1,0} fusion(%d), kind=kCustom, calls=%all-reduce-scatter.5
}

ENTRY %main (p: f32[8,4]) -> f32[8,4] {
  ROOT %w = (s32[], f32[8,4]) while(%t), condition=%condition, body=%body, metadata={op_name="w"}
}
"""  # noqa: E501


def test_rounds_of_a_loop_without_a_counter_are_given():
    def local(x):
        return lax.while_loop(lambda y: jnp.sum(y) > 0, summed, x)

    text = compiled_text(local, P("d"))
    assert traffic(text, rounds=0) == {}
    assert traffic(text, rounds=2)["all-reduce"].count == 2


def test_of_loops_that_wait_the_one_that_sends_most_runs():
    def until(change, size=1.0):
        return lambda x: lax.while_loop(lambda y: jnp.sum(y) > size, change, x)

    def start_and_refresh(x):
        x = until(summed)(x)
        return until(lambda y: until(summed, 2.0)(gathered(y)[:8] + gathered(2 * y)[:8]))(x)

    found = traffic(compiled_text(start_and_refresh, P("d")))
    assert set(found) == {"all-gather"}


# A product whose operand goes round while it is multiplied: eight steps, two in a round.
WINDOWED = """
%condition (s: (f32[4], u32[])) -> pred[] {
  %bound = u32[]{:T(128)} constant(8)
  ROOT %lt = pred[] compare(%get-tuple-element.1, %bound), direction=LT
}

%body (s: (f32[4], u32[])) -> (f32[4], u32[]) {
  %one = u32[]{:T(128)} constant(1)
  %two = u32[]{:T(128)} constant(2)
  %get-tuple-element.2 = u32[]{:T(128)} get-tuple-element(%s), index=1
  %inner = u32[]{:T(128)} add(%get-tuple-element.2, %one)
  %next = u32[]{:T(128)} add(%get-tuple-element.2, %two), metadata={op_name="dot"}
  %p.1 = f32[4]{0} collective-permute(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}
  %p.2 = f32[4]{0} collective-permute(%p.1), channel_id=2, source_target_pairs={{0,1},{1,0}}
}

ENTRY %main (p: f32[4]) -> f32[4] {
  ROOT %w = (f32[4], u32[]) while(%t), condition=%condition, body=%body
}
"""


def test_products_whose_operands_go_round():
    assert traffic(WINDOWED, rounds=0) == {"collective-permute": (8, 128, 128)}


def test_forms_of_the_tpu_compiler():
    assert traffic(TPU_TEXT) == {
        "all-gather": (3, 3 * 32, 3 * 24),
        "all-to-all": (6, 6 * 64, 6 * 48),
        "reduce-scatter": (3, 3 * 32, 3 * 96),
    }
    written = {"all-gather": (1, 32), "all-to-all": (2, 128), "reduce-scatter": (1, 32)}
    assert collectives(TPU_TEXT) == written
    # Two that are alike and begun apart are two, though a channel may name both.
    again = "  %f.5 = (bf16[1,4], bf16[4,4]) fusion(%e), kind=kCustom, calls=%start\n  ROOT %f.3"
    assert collectives(TPU_TEXT.replace("  ROOT %f.3", again))["all-gather"].count == 2

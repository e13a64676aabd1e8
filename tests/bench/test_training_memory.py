"""A training step holds what it has to, and little more."""

import pytest

from tests.bench.training_memory import decoder, training_bytes

ALLOWED = 1.10


@pytest.mark.parametrize(
    ("model", "remat"), [("gpt2-124m", "none"), ("llama-124m", "dots"), ("gpt2-124m", "full")]
)
def test_a_scanned_step_holds_little_beside_what_it_has_to(model, remat):
    found = training_bytes(decoder(model, "scanned", remat))
    assert found.ratio <= ALLOWED, found


def test_without_all_logits_the_layer_that_is_computed_again_counts():
    config = decoder("gpt2-124m", "scanned", "full")
    found = training_bytes(config, head_chunks=8)
    assert found.ratio_with_layer <= ALLOWED, found
    # Two copies of the state would not pass.
    assert training_bytes(config, head_chunks=8, donate=False).ratio_with_layer > ALLOWED

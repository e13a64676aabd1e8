"""Limits on how far a reader travels through one update, and on the lines of four packages.

Lower a limit when the code allows it; raise one only with a reason in the changelog.
"""

import json
import subprocess
import sys

import pytest

from tests.readability import Travel

# Files below optim/, files below jaxopt_lab/, calls from one file into another.
LIMITS = {
    "scale_by_lion_muon": Travel(4, 8, 13),
    "scale_by_soap": Travel(6, 13, 60),
    "scale_by_dykaf": Travel(6, 14, 88),
    "scale_by_shampoo": Travel(8, 13, 59),
    "optax's Muon": Travel(0, 4, 5),  # that the counting has not changed
}
# 785 of them came with low-rank sums, oracles, projections, noise by position and their keys.
# 160 with packed weights, which `lora` below the models has to know; 17 with sums of directions;
# 11 with products by inverses of the small Cholesky factors of low-rank sums, two thirds of a step.
# 21 with dropout that keeps one bit an entry, of encoders and adapters.
# 6 with moments that are sharded by columns where their rows cannot be divided.
# 4 with the transpose of a packed matrix: a tied head multiplies with it.
# 7 with eigenvectors by another method on a TPU, which compile in seconds.
# 21 with gradients of other shapes than their leaves and values that are no keys, both named, and
# with the places of options of zero-order methods.
# 83 with stacks of leaves that lie differently and share one program, which a TPU compiles in half
# of the time; 32 with exchanges among more than 64 chips in two stages.
LINES = 10_555


@pytest.fixture(scope="module")
def measured():
    # A process of its own: what an earlier test has traced is not traced again.
    command = [sys.executable, "-m", "tests.readability", "--json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize("name", LIMITS)
def test_an_update_can_be_followed(measured, name):
    found = Travel(**measured["travel"][name])
    assert all(a <= b for a, b in zip(found, LIMITS[name], strict=True)), found


def test_the_packages_stay_short(measured):
    assert sum(measured["lines"].values()) <= LINES, measured["lines"]

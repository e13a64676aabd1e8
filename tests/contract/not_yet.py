"""What does not keep the contract yet: (row, factory, case), each a strict expected failure.

A row is a test of `test_defaults` without its "test_". An entry that passes fails the suite: take
it out when the code is mended.
"""

from itertools import product

_LION = ("lion_muon", "sign_muon", "legacy_sign_muon", "muon", "d_muon", "scale_by_lion_muon")
_SIGN = ("signum", "normalized_sgd", "scale_by_normalized_heavy_ball")
_KRONECKER = ("soap", "dykaf", "dykaf_official", "shampoo")
_DIRECTIONS = ("scale_by_soap", "scale_by_dykaf", "scale_by_shampoo")
_EVERY = (*_LION, *_SIGN, *_KRONECKER, *_DIRECTIONS)
# Factories without a learning rate, without a decay, and with neither Newton-Schulz nor a period.
_NO_RATE = (*_DIRECTIONS, "scale_by_lion_muon", "scale_by_normalized_heavy_ball")
_RATED = tuple(n for n in _EVERY if n not in (*_NO_RATE, "legacy_sign_muon"))

NOT_YET: set[tuple[str, ...]] = {
    *product(["what_is_not_finite_is_refused"], [*_LION, *_SIGN], ["nan", "inf", "huge"]),
    *product(
        ["scale_never_matters"],
        [n for n in _LION if n != "legacy_sign_muon"],
        ["tiny", "small"],
    ),
    *product(["rates_of_numpy_keep_dtypes"], _RATED, ["float64", "float32"]),
    *product(["hyperparameters_can_be_injected"], _LION),
    *product(["rank_promotion"], [*_KRONECKER, *_DIRECTIONS, "adaptive_warmup"]),
    *product(
        ["weight_decay_as_a_schedule"],
        [n for n in (*_EVERY,) if n not in ("scale_by_normalized_heavy_ball", "scale_by_shampoo")],
    ),
    *product(["leaves_no_optimizer_can_move_are_named"], _EVERY, ["complex", "function"]),
}

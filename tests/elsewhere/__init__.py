"""Steps of the methods inside other projects; scripts, which pytest does not collect.

Each runs by itself, in an environment with this package and the project it names:

    python -m tests.elsewhere.linen        # nanodo's model on boxed, sharded parameters (Flax)
    python -m tests.elsewhere.nnx_models   # Flax's mnist example and Gemma's layers (Flax)
    python -m tests.elsewhere.equinox_mlp  # an unfiltered and a filtered module (equinox)
    python -m tests.elsewhere.haiku_net    # attention and a head (dm-haiku)
    python -m tests.elsewhere.minimise     # optimistix.OptaxMinimiser (optimistix)
    python -m tests.elsewhere.maxtext      # its dimension-number tree, scanned layers (Flax)

nanodo and MaxText are no packages of an index, so their models are written again, as small as they
go, from the named files; names and ranks of the parameters are theirs. `tests/optim/model_trees.py`
keeps these trees for the suite. A script prints a line for each method and exits with an error if
a parameter does not move, is not finite, or its loss does not fall.
"""

"""Replay of reference trajectories through the public API: `python -m tests.golden DIRECTORY`.

A directory holds one folder a family, each case a `NAME.npz` and a `NAME.json` sidecar. A family
joins by one module with `replay(case) -> list[Result]` and one row in `harness.FAMILIES`.
"""

"""Replay of the learning dynamics: the layout tells which of the two laboratories it belongs to."""

from tests.golden.harness import Case, NotUnderstood, Result


def replay(case: Case) -> list[Result]:
    """All comparisons of one case."""
    if not case.sidecar.keys().isdisjoint("ABCDEF"):
        from tests.golden import dynamics_sgd

        return dynamics_sgd.replay(case)
    if not case.sidecar.keys().isdisjoint(("cases", "replay", "grid", "density", "mean_field")):
        try:
            from tests.golden import dynamics_loop  # pyright: ignore[reportAttributeAccessIssue]
        except ImportError as missing:
            raise NotUnderstood("repeated learning has no replay") from missing
        return dynamics_loop.replay(case)
    raise NotUnderstood("neither sections A to F nor those of repeated learning")

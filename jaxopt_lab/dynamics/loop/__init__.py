"""Repeated learning: data, learners, the loop itself and its statistics."""

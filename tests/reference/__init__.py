"""Slow, readable float64 NumPy versions of the methods, written from their equations alone.

No parameter influences another in any of these methods, so each reference takes one parameter and
its gradients and returns the whole trajectory.
"""

"""Flax NNX transformers."""

"""Arrays in, arrays out; imports jax only."""

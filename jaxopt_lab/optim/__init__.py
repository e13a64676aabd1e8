"""First-order optimizers as Optax transforms, one method per file."""

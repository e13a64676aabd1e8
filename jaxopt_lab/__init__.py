"""Research optimizers as pure Optax transforms, and a stack that trains with them."""

"""Checkpoints of the base model: where they have its weights, and an adapter merged into them."""

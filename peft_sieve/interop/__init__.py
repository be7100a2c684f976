"""What leaves the package, or comes into it from others: plain LoRA, merged checkpoints, model cards."""

"""Plain LoRA: a sparse adapter written as one, and one narrowed to a sparse adapter."""

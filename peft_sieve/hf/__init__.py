"""Where the package touches PEFT and transformers: the registry of its methods, and what has no hook there."""

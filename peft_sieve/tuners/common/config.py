"""What the configurations of several methods have in common."""

# Held by the object, never by a dataclass field: PEFT serialises with `dataclasses.asdict`, which deep-copies fields.
RUNTIME_ONLY = ("calib_dataset", "calib_tokenizer", "calib_formatting_func")

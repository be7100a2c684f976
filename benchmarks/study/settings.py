"""What is the same in every run of the study; fixed before the first one."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "tiny-olmoe"


@dataclass(frozen=True)
class Settings:
    """Part of every row; rows of other settings are never mixed.

    Attributes:
        model: folder of the base model; a row has its name.
        steps, batch_size: of training.
        learning_rate: what suits LoRA on all experts best, for each task the same (`learning_rate.py`); warmed up over
            `warmup_steps`, then falling along a cosine.
        max_length: tokens of prompt and completion; longer rows are left out, of training and of evaluation.
        held_out: rows evaluated, drawn once.
        calibration_samples: rows profiled for the selections, drawn once from the training rows.
        hot: share of experts that the method adapts by default.
    """

    model: Path = MODEL
    steps: int = 48
    batch_size: int = 8
    learning_rate: float = 5e-3
    warmup_steps: int = 5
    max_grad_norm: float = 1.0
    r: int = 16
    lora_alpha: int = 32
    max_length: int = 160
    held_out: int = 192
    calibration_samples: int = 128
    hot: float = 0.25

    def as_row(self) -> dict[str, Any]:
        return {**asdict(self), "model": self.model.name}

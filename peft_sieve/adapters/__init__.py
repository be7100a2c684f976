"""An adapter as files: read, summarised, written as plain LoRA or merged into a checkpoint."""

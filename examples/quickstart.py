"""Fine-tune a quarter of the experts of a small Mixture-of-Experts model: profile, select, train, save, load.

The model, `tiny-olmoe`, has never seen the task, SQL for a question and the tables of a database (Spider), and learns
it on a CPU in about a minute. For a model of your own, change MODEL, `read_rows` and the training arguments.

    python examples/quickstart.py [--out DIR]
"""

import argparse
import json
import lzma
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

# Nothing is downloaded. One thread of the CPU gives everybody the same numbers, and loses little on matrices this
# small: several threads wait for each other, for minutes in all where other programs share the cores.
os.environ.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
os.environ.update(TQDM_DISABLE="1", TRANSFORMERS_VERBOSITY="error")

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from peft_sieve import SieveLoraConfig, profile_routing, select_experts
from peft_sieve.report.heatmap import save_heatmap
from peft_sieve.report.tables import coverage_table

EXAMPLES = Path(__file__).resolve().parent
MODEL = EXAMPLES / "tiny-olmoe"
STEPS, BATCH_SIZE, CALIBRATION_SAMPLES = 48, 8, 128

# What another process, on another day, does with the adapter.
FRESH_PROCESS = """
import sys, torch
import peft_sieve  # registers the adapter type with PEFT
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
expected = torch.load(sys.argv[2])
with torch.no_grad():
    logits = model(**expected["inputs"]).logits
sys.exit(None if torch.equal(logits, expected["logits"]) else "The loaded adapter gives other logits than the trained.")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/quickstart"), metavar="DIR", help="default: %(default)s")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", category=FutureWarning)  # libraries about each other, nothing to act on
    start = time.time()

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    train, held_out = read_rows("spider_train"), read_rows("spider_dev")
    print(f"{MODEL.name} learns SQL: {len(train):,} questions, and {len(held_out)} held out, on other databases")

    print(f"\n1. Profile the router on {CALIBRATION_SAMPLES} questions, select the hottest quarter of each layer")
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    profile = profile_routing(model, train, tokenizer=tokenizer, max_samples=CALIBRATION_SAMPLES)
    selection = select_experts(profile, top_k_frac=0.25)
    print(coverage_table(profile, selection))
    save_heatmap(profile, out / "routing.png", selection)
    results = {"before": evaluate(model, tokenizer, held_out)}

    print("\n2. Fine-tune those experts, with attention and router")
    sieve, cost = fine_tune(tokenizer, train, top_k_frac=0.25, save_to=out / "adapter")
    results["quarter of experts"] = evaluate(sieve, tokenizer, held_out) | cost

    print("\n3. Fine-tune all experts, for comparison")
    full, cost = fine_tune(tokenizer, train, top_k_frac=1.0, save_to=out / "adapter_all_experts")
    results["all experts"] = evaluate(full, tokenizer, held_out) | cost

    print(f"\n4. Compare on the {len(held_out)} held-out questions")
    print(" " * 21, *(f"{column:>18}" for column in results))
    for measure in results["all experts"]:
        print(f"{measure:21}", *(f"{values.get(measure, ''):>18}" for values in results.values()))

    print("\n5. Load the adapter in a fresh process")
    check_in_fresh_process(sieve, tokenizer, held_out, out / "adapter")
    print("Its logits are the same, bit for bit.")
    print(f"\nDone in {time.time() - start:.0f} s. Written to {out}: routing.png, adapter, adapter_all_experts")


def read_rows(name: str) -> Dataset:
    """Rows in TRL's form of prompt and completion; the loss is taken on the completion, here the SQL."""
    with lzma.open(EXAMPLES / "data" / f"{name}.jsonl.xz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    prompts = [f"Tables: {row['schema']}\nQuestion: {row['question']}\nSQL:" for row in rows]
    return Dataset.from_dict({"prompt": prompts, "completion": [f" {row['query']}<|endoftext|>" for row in rows]})


def fine_tune(tokenizer: Any, train: Dataset, top_k_frac: float, save_to: Path) -> tuple[Any, dict[str, str]]:
    """The trained and saved model, and what it took."""
    # The only difference to LoRA: this configuration, which profiles the model on `calib_dataset`, and selects.
    sieve = SieveLoraConfig(
        top_k_frac=top_k_frac,
        calib_dataset=train,
        calib_samples=CALIBRATION_SAMPLES,
        r=16,
        lora_alpha=32,
        lora_dropout=0.0,  # in half an epoch, nothing is seen twice
        task_type="CAUSAL_LM",
    )
    arguments = SFTConfig(
        max_steps=STEPS,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=5e-3,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        logging_steps=STEPS // 4,
        save_strategy="no",
        report_to="none",
        # The defaults are made for a GPU.
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    set_seed(0)  # the adapter begins at random
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    trainer = SFTTrainer(model, arguments, train_dataset=train, processing_class=tokenizer, peft_config=sieve)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(PrintLoss())
    start = time.time()
    trainer.train()
    seconds = time.time() - start
    trainer.model.save_pretrained(save_to)
    parameters = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    megabytes = (save_to / "adapter_model.safetensors").stat().st_size / 1e6
    return trainer.model, {
        "trainable parameters": f"{parameters:,}",
        "adapter file": f"{megabytes:.2f} MB",
        "training time": f"{seconds:.0f} s",
    }


class PrintLoss(TrainerCallback):
    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "loss" in logs:
            print(f"  step {state.global_step:3} of {state.max_steps}   training loss {float(logs['loss']):.2f}")


def evaluate(model: Any, tokenizer: Any, rows: Dataset) -> dict[str, str]:
    loss, right_tokens, right_queries = measure(model, tokenizer, rows)
    return {
        "loss per SQL token": f"{loss:.2f}",
        "next token right": f"{right_tokens:.1%}",
        "whole query right": f"{right_queries:.1%}",
    }


@torch.no_grad()
def measure(model: Any, tokenizer: Any, rows: Dataset) -> tuple[float, float, float]:
    """Loss per token of completion; share of those tokens, and of whole completions, that are the likeliest."""
    model.eval()
    loss, tokens, right_tokens, right_completions = 0.0, 0, 0, 0
    for batch in rows.iter(batch_size=16):
        inputs, in_completion = tokenized(tokenizer, batch)
        logits = model(**inputs).logits[:, :-1]  # (batch, seq - 1, vocabulary)
        targets, in_completion = inputs["input_ids"][:, 1:], in_completion[:, 1:]
        wanted = targets[in_completion]
        loss += torch.nn.functional.cross_entropy(logits[in_completion], wanted, reduction="sum").item()
        tokens += int(in_completion.sum())
        right = (logits.argmax(-1) == targets) & in_completion
        right_tokens += int(right.sum())
        # When every token is the likeliest after the true ones before it, greedy decoding writes the whole completion.
        right_completions += int((right == in_completion).all(dim=1).sum())
    return loss / tokens, right_tokens / tokens, right_completions / len(rows)


def tokenized(tokenizer: Any, batch: dict[str, list[str]]) -> tuple[Any, torch.Tensor]:
    """Padded inputs for the model, and which of their tokens belong to a completion: (batch, seq)."""
    texts = [prompt + completion for prompt, completion in zip(batch["prompt"], batch["completion"], strict=True)]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    starts = torch.tensor([len(ids) for ids in tokenizer(batch["prompt"])["input_ids"]])
    positions = torch.arange(inputs["input_ids"].shape[1])
    return inputs, (positions >= starts[:, None]) & inputs["attention_mask"].bool()


def check_in_fresh_process(model: Any, tokenizer: Any, rows: Dataset, adapter: Path) -> None:
    """End with an error unless another process computes the same logits from the saved adapter."""
    inputs = dict(tokenizer(rows["prompt"][:8], padding=True, return_tensors="pt"))
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        torch.save({"inputs": inputs, "logits": model(**inputs).logits}, f"{folder}/expected.pt")
        command = [sys.executable, "-W", "ignore::FutureWarning", "-c", FRESH_PROCESS, adapter, f"{folder}/expected.pt"]
        if subprocess.run(command, check=False).returncode:
            sys.exit(1)


if __name__ == "__main__":
    main()

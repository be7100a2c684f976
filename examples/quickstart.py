"""Fine-tune a quarter of a Mixture-of-Experts model's experts: profile, select, train, save, load. A minute on a CPU.

The model (`tiny-olmoe`) has never seen the task: writing SQL for a question and the tables of a database (Spider). The
same script with a larger model and your data is what you would run on a GPU.

    python examples/quickstart.py [--out out/quickstart]
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

# All that is needed lies beside this file, and the CPU gives everybody the same numbers.
os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", TQDM_DISABLE="1", TRANSFORMERS_VERBOSITY="error")

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from peft_sieve import SieveLoraConfig, profile_routing, select_experts
from peft_sieve.report.heatmap import save_heatmap
from peft_sieve.report.tables import coverage_table

EXAMPLES = Path(__file__).resolve().parent
MODEL = EXAMPLES / "tiny-olmoe"
STEPS, BATCH_SIZE, CALIBRATION_SAMPLES = 60, 8, 128

# What another process, on another day, does with the adapter.
FRESH_PROCESS = """
import sys, torch
import peft_sieve  # registers the adapter type with PEFT
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
saved = torch.load(sys.argv[2])
with torch.no_grad():
    logits = model(**saved["inputs"]).logits
sys.exit(0 if torch.equal(logits, saved["logits"]) else "the loaded adapter gives other logits than the trained one")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/quickstart"), help="folder for what is written")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    # transformers and TRL renaming each other's options is nothing to act on here.
    warnings.filterwarnings("ignore", category=FutureWarning)
    start = time.time()

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    train, held_out = read_rows("spider_train"), read_rows("spider_dev")
    print(f"{MODEL.name} on Spider: {len(train):,} questions to train on, {len(held_out)} held out (other databases)")

    heading(1, f"Profile the router on {CALIBRATION_SAMPLES} training questions, select the hottest 25% of each layer")
    model = load_model()
    profile = profile_routing(model, train, tokenizer=tokenizer, max_samples=CALIBRATION_SAMPLES)
    selection = select_experts(profile, top_k_frac=0.25)
    print(coverage_table(profile, selection))
    save_heatmap(profile, out / "routing.png", selection)
    results = {"before": evaluate(model, tokenizer, held_out)}

    heading(2, "Fine-tune those experts, attention and router")
    sieve, seconds = fine_tune(model, tokenizer, train, top_k_frac=0.25)
    sieve.save_pretrained(out / "adapter")
    results["25% of experts"] = evaluate(sieve, tokenizer, held_out) | size(sieve, out / "adapter", seconds)

    heading(3, "Fine-tune all experts, for comparison")
    full, seconds = fine_tune(load_model(), tokenizer, train, top_k_frac=1.0)
    full.save_pretrained(out / "adapter_all_experts")
    results["all experts"] = evaluate(full, tokenizer, held_out) | size(full, out / "adapter_all_experts", seconds)

    heading(4, f"Compare on the {len(held_out)} held-out questions")
    print_results(results)

    heading(5, "Load the adapter in a fresh process")
    check_in_fresh_process(sieve, tokenizer, held_out, out)
    print("Its logits are the same, bit for bit.")

    print(f"\nDone in {time.time() - start:.0f} s. Written:")
    for name in ("routing.png", "adapter", "adapter_all_experts"):
        print(f"  {out / name}")


def read_rows(name: str) -> Dataset:
    """Rows in TRL's prompt and completion form; the loss is taken over the completion, here the SQL."""
    with lzma.open(EXAMPLES / "data" / f"{name}.jsonl.xz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return Dataset.from_list(
        [
            {
                "prompt": f"Tables: {row['schema']}\nQuestion: {row['question']}\nSQL:",
                "completion": f" {row['query']}<|endoftext|>",
            }
            for row in rows
        ]
    )


def load_model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


def fine_tune(model: Any, tokenizer: Any, train: Dataset, top_k_frac: float) -> tuple[Any, float]:
    """The model with a trained adapter, and the seconds that training took."""
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=train,
        # The only difference to LoRA: the configuration, which profiles `calib_dataset` and selects.
        peft_config=SieveLoraConfig(
            r=16,
            lora_alpha=32,
            lora_dropout=0.0,  # nothing is seen twice
            top_k_frac=top_k_frac,
            calib_dataset=train,
            calib_tokenizer=tokenizer,
            calib_samples=CALIBRATION_SAMPLES,
            task_type="CAUSAL_LM",
        ),
        args=SFTConfig(
            output_dir="unused",
            save_strategy="no",
            max_steps=STEPS,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=5e-3,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            logging_steps=STEPS // 4,
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
            seed=0,
        ),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(PrintLoss())
    start = time.time()
    trainer.train()
    return trainer.model, time.time() - start


class PrintLoss(TrainerCallback):
    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "loss" in logs:
            print(f"  step {state.global_step:3d} of {state.max_steps}   training loss {float(logs['loss']):.2f}")


@torch.no_grad()
def evaluate(model: Any, tokenizer: Any, rows: Dataset) -> dict[str, str]:
    """Loss per token of SQL, share of those tokens and of whole queries that greedy decoding gets right."""
    model.eval()
    loss, tokens, right_tokens, right_queries = 0.0, 0, 0, 0
    for batch in rows.iter(batch_size=16):
        texts = [prompt + completion for prompt, completion in zip(batch["prompt"], batch["completion"], strict=True)]
        inputs = tokenizer(texts, padding=True, return_tensors="pt")
        starts = torch.tensor([len(ids) for ids in tokenizer(batch["prompt"])["input_ids"]])
        logits = model(**inputs).logits[:, :-1]  # (batch, seq - 1, vocabulary)
        targets = inputs["input_ids"][:, 1:]
        in_sql = (torch.arange(1, targets.shape[1] + 1) >= starts[:, None]) & inputs["attention_mask"][:, 1:].bool()
        right = logits.argmax(-1) == targets
        loss += torch.nn.functional.cross_entropy(logits[in_sql], targets[in_sql], reduction="sum").item()
        tokens += int(in_sql.sum())
        right_tokens += int((right & in_sql).sum())
        # If each token is the likeliest after the right ones before it, greedy decoding writes the whole query.
        right_queries += int((right | ~in_sql).all(dim=1).sum())
    return {
        "loss per token of SQL": f"{loss / tokens:.2f}",
        "next token right": f"{right_tokens / tokens:.1%}",
        "whole query right": f"{right_queries / len(rows):.1%}",
    }


def size(model: Any, adapter: Path, seconds: float) -> dict[str, str]:
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    megabytes = (adapter / "adapter_model.safetensors").stat().st_size / 1e6
    return {
        "trainable parameters": f"{parameters:,}",
        "adapter file": f"{megabytes:.2f} MB",
        "training time": f"{seconds:.0f} s",
    }


def check_in_fresh_process(model: Any, tokenizer: Any, rows: Dataset, out: Path) -> None:
    """End with an error unless another process computes the same logits from the saved adapter."""
    inputs = dict(tokenizer(rows["prompt"][:8], padding=True, return_tensors="pt"))
    with torch.no_grad():
        torch.save({"inputs": inputs, "logits": model(**inputs).logits}, out / "logits.pt")
    finished = subprocess.run([sys.executable, "-c", FRESH_PROCESS, out / "adapter", out / "logits.pt"], check=False)
    if finished.returncode:
        sys.exit(finished.returncode)


def heading(number: int, text: str) -> None:
    print(f"\n{number}. {text}")


def print_results(results: dict[str, dict[str, str]]) -> None:
    print(" " * 22 + "".join(f"{column:>18}" for column in results))
    for measure in list(results.values())[-1]:
        print(f"{measure:22}" + "".join(f"{column.get(measure, ''):>18}" for column in results.values()))


if __name__ == "__main__":
    main()

"""Train a small Mixture-of-Experts language model from scratch, like those in the folders beside this file.

It learns a byte-level BPE tokenizer from the given text, or takes an existing one, then trains a model of a few million
parameters on documents drawn from weighted domains, and saves both in one folder. The model is an OLMoE or a Qwen2-MoE,
the latter with a shared expert and with router weights normalised over a token's experts. Text comes from .txt files
(one document each) and .jsonl files (one a line, in the field `text`), compressed with xz or not. Runs on a GPU if one
is there:

    python examples/train_small_moe.py --out out/small-moe --steps 200 \\
        --domain prose=60:books/*.txt --domain code=40:sources.jsonl.xz
"""

from __future__ import annotations

import argparse
import glob
import json
import lzma
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    get_cosine_schedule_with_warmup,
)

END, PAD = "<|endoftext|>", "<|pad|>"


def main() -> None:
    args = parse_arguments()
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    domains = {name: (weight, read_documents(pattern)) for name, weight, pattern in args.domain}
    if existing := args.init or args.tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(existing)
    else:
        tokenizer = train_tokenizer([text for _, texts in domains.values() for text in texts], args.vocab_size)
    streams = {name: tokens_of(tokenizer, texts) for name, (_, texts) in domains.items()}
    for name, stream in streams.items():
        print(f"{name}: {stream.numel():,} tokens")

    if args.init:
        model = AutoModelForCausalLM.from_pretrained(args.init, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_config(model_config(args, tokenizer))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).train()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, on {device}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, args.steps // 20), args.steps)
    weights = [domains[name][0] for name in streams]
    for step, batch in enumerate(batches(list(streams.values()), weights, args), start=1):
        batch = batch.to(device)
        # With its labels the model returns the language-modelling loss plus the weighted load-balancing loss.
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % args.log_every == 0 or step in (1, args.steps):
            print(f"step {step:6} of {args.steps}   loss {loss.item():.3f}", flush=True)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"Saved to {args.out}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for model and tokenizer")
    parser.add_argument(
        "--domain",
        action="append",
        type=domain,
        required=True,
        metavar="NAME=WEIGHT:PATTERN",
        help="text of one domain and its share of the training sequences; give it once per domain",
    )
    parser.add_argument(
        "--init",
        type=Path,
        help="folder of a model to train further; its tokenizer and shape replace the options for them",
    )
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=32, help="sequences a step")
    parser.add_argument("--length", type=int, default=256, help="tokens a sequence")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument(
        "--tokenizer", type=Path, help="folder of an existing tokenizer, to use instead of learning one"
    )
    parser.add_argument("--vocab-size", type=int, default=4096, help="tokens of the tokenizer that is learned")
    parser.add_argument("--model-type", choices=("olmoe", "qwen2_moe"), default="olmoe")
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--expert-size", type=int, default=48)
    parser.add_argument("--shared-expert-size", type=int, default=64, help="width of the shared expert (qwen2_moe)")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def domain(text: str) -> tuple[str, float, str]:
    """NAME=WEIGHT:PATTERN"""
    name, _, rest = text.partition("=")
    weight, _, pattern = rest.partition(":")
    if not (name and pattern):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=WEIGHT:PATTERN")
    return name, float(weight), pattern


def read_documents(pattern: str) -> list[str]:
    documents = []
    for path in sorted(glob.glob(pattern, recursive=True)):
        with lzma.open(path, "rt") if path.endswith(".xz") else open(path) as file:
            if ".jsonl" in Path(path).suffixes:
                documents += [json.loads(line)["text"] for line in file]
            else:
                documents.append(file.read())
    if not documents:
        raise SystemExit(f"No document matches {pattern!r}.")
    return documents


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, digits one by one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PAD)


def tokens_of(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All documents in a row, END between them: (tokens,)."""
    end = tokenizer.eos_token_id
    return torch.tensor([token for ids in tokenizer(texts)["input_ids"] for token in (end, *ids)] + [end])


def model_config(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    heads = max(1, args.hidden_size // 32)
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": args.hidden_size,
        "num_hidden_layers": args.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "num_experts": args.experts,
        "num_experts_per_tok": args.top_k,
        "max_position_embeddings": 4 * args.length,
        "router_aux_loss_coef": 0.01,
        "output_router_logits": True,  # for the load-balancing loss, here and in training that follows
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if args.model_type == "olmoe":
        return OlmoeConfig(intermediate_size=args.expert_size, **settings)
    return Qwen2MoeConfig(
        moe_intermediate_size=args.expert_size,
        shared_expert_intermediate_size=args.shared_expert_size,
        norm_topk_prob=True,
        **settings,
    )


def batches(streams: list[torch.Tensor], weights: list[float], args: argparse.Namespace) -> Iterator[torch.Tensor]:
    """Random windows of randomly drawn domains: (batch, length)."""
    for _ in range(args.steps):
        rows = []
        for stream in random.choices(streams, weights, k=args.batch_size):
            start = random.randrange(max(1, stream.numel() - args.length))
            row = stream[start : start + args.length]
            rows.append(row.repeat(-(-args.length // row.numel()))[: args.length])
        yield torch.stack(rows)


if __name__ == "__main__":
    main()

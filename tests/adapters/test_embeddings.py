"""Embeddings that an adapter brings along, and whatever else its file holds: carried, or refused by name."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV4ForCausalLM,
    Kimi_K25ForConditionalGeneration,
    Qwen3VLMoeForConditionalGeneration,
)
from transformers.models.nemotron3_5_transcribe.modeling_nemotron3_5_transcribe import (
    Nemotron3_5TranscribeForConditionalGeneration,
)

from peft_sieve import SieveError, SieveLoraConfig, export_lora, merge_checkpoint, narrow_lora
from peft_sieve.cli import main
from peft_sieve.moe.topology import find_moe_layers
from tests.adapters.saved import Adapter, relative_difference
from tests.architectures.tiny import inputs_for
from tests.architectures.tiny import tiny_model as tiny_model_of
from tests.models import TINY_OLMOE, randomize_adapters, tiny_model, token_batch

MASK = {"model.layers.0.mlp.experts": [1, 6], "model.layers.1.mlp.experts": [0, 3]}
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def trained(
    folder: Path,
    rows: int = 128,
    tied: bool = False,
    ordinary: bool = False,
    save: dict[str, Any] | None = None,
    **kw: Any,
) -> Adapter:
    """A saved adapter whose model has embeddings of its own, in that number."""
    base = tiny_model("olmoe", tie_word_embeddings=tied)
    base.save_pretrained(folder / "base", max_shard_size="40KB")
    base.name_or_path = str(folder / "base")
    changed = copy.deepcopy(base)
    if rows != 128:
        changed.resize_token_embeddings(rows)
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **kw}
    config = (
        LoraConfig(target_parameters=STACKS, **options)
        if ordinary
        else SieveLoraConfig(selected_experts=MASK, **options)
    )
    model = get_peft_model(changed, config).eval()
    randomize_adapters(model)
    generator = torch.Generator().manual_seed(5)
    for end in (model.get_input_embeddings(), model.get_output_embeddings()):
        end.requires_grad_()
        end.weight.data.normal_(std=0.2, generator=generator)
    model.save_pretrained(folder / "adapter", **(save or {}))
    return Adapter(folder / "base", base, model, folder / "adapter", token_batch(changed))


CASES: dict[str, dict[str, Any]] = {
    "more": {"rows": 144},
    "fewer": {"rows": 100},
    "more, tied": {"rows": 144, "tied": True},
    "as many": {"save": {"save_embedding_layers": True}},
    "tied": {"tied": True, "save": {"save_embedding_layers": True}},
    "with factors": {"rows": 144, "target_modules": ["q_proj", "embed_tokens", "lm_head"]},
}


@pytest.fixture(scope="module", params=CASES)
def adapter(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    return trained(tmp_path_factory.mktemp("adapter"), **CASES[request.param])


def on_the_base(adapter: Adapter, path: Path) -> torch.Tensor:
    base = adapter.fresh()
    rows = adapter.model.get_input_embeddings().weight.shape[0]
    base.resize_token_embeddings(rows)
    return adapter.logits(PeftModel.from_pretrained(base, path))


@pytest.mark.parametrize("layout", ["per_expert", "stacked"])
def test_plain_lora_carries_them(adapter: Adapter, layout: str, tmp_path: Path) -> None:
    for name, source in (("live", adapter.model), ("saved", adapter.path)):
        export_lora(source, tmp_path / name, layout=layout)
        assert relative_difference(on_the_base(adapter, tmp_path / name), adapter.logits()) < 1e-5
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("live", "saved")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("named", [False, True], ids=["without the prefix", "with the adapter's name"])
def test_plain_lora_carries_those_of_files_with_other_keys(named: bool, tmp_path: Path) -> None:
    """Keys that loading takes, reading takes, too, and loses nothing by them."""
    adapter = trained(tmp_path, rows=144)
    file = adapter.path / "adapter_model.safetensors"

    def other(key: str) -> str:
        return re.sub(r"(\.lora_\w+)\.", r"\1.default.", key) if named else key.removeprefix("base_model.model.")

    save_file({other(key): value for key, value in load_file(file).items()}, file)
    export_lora(adapter.path, tmp_path / "plain")
    assert relative_difference(on_the_base(adapter, tmp_path / "plain"), adapter.logits()) < 1e-5


def test_a_merged_checkpoint_has_them(adapter: Adapter, tmp_path: Path) -> None:
    rows = adapter.model.get_input_embeddings().weight.shape[0]
    for name, source in (("live", adapter.model), ("saved", adapter.path)):
        merge_checkpoint(source, adapter.base_path, tmp_path / name)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert model.config.vocab_size == rows
        assert relative_difference(adapter.logits(model), adapter.logits()) < 1e-5
        index = json.loads((tmp_path / name / "model.safetensors.index.json").read_text())
        tensors = {key: load_file(tmp_path / name / file)[key] for key, file in index["weight_map"].items()}
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
        before = json.loads((adapter.base_path / "model.safetensors.index.json").read_text())["weight_map"]
        assert index["weight_map"] == before


def test_a_merged_checkpoint_has_those_of_a_loaded_adapter(tmp_path: Path) -> None:
    adapter = trained(tmp_path, save={"save_embedding_layers": True})
    loaded = PeftModel.from_pretrained(adapter.fresh(), adapter.path)
    merge_checkpoint(loaded, adapter.base_path, tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert relative_difference(adapter.logits(model), adapter.logits()) < 1e-5


def test_the_commands_do_the_same(tmp_path: Path) -> None:
    adapter = trained(tmp_path, rows=144)
    assert main(["export", str(adapter.path), str(tmp_path / "lora")]) == 0
    assert relative_difference(on_the_base(adapter, tmp_path / "lora"), adapter.logits()) < 1e-5
    assert main(["export", str(adapter.path), str(tmp_path / "merged"), "--merge"]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert relative_difference(adapter.logits(model), adapter.logits()) < 1e-5
    mask = tmp_path / "mask.json"
    mask.write_text(json.dumps(MASK))
    assert main(["narrow", str(tmp_path / "lora"), str(tmp_path / "narrowed"), "--mask", str(mask)]) == 0
    assert relative_difference(on_the_base(adapter, tmp_path / "narrowed"), adapter.logits()) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_narrowing_carries_them(case: str, tmp_path: Path) -> None:
    adapter = trained(tmp_path, ordinary=True, **CASES[case])
    for name, source in (("live", adapter.model), ("saved", adapter.path)):
        narrow_lora(source, tmp_path / name, dict.fromkeys(MASK, range(8)))
        assert relative_difference(on_the_base(adapter, tmp_path / name), adapter.logits()) < 1e-5


def test_embeddings_of_one_end_only(tmp_path: Path) -> None:
    # PEFT saves the end that has factors, and forgets the other.
    options: dict[str, Any] = {"rows": 144, "target_modules": ["q_proj", "embed_tokens"]}
    adapter = trained(tmp_path / "a", **options)
    merge_checkpoint(adapter.model, adapter.base_path, tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert relative_difference(adapter.logits(model), adapter.logits()) < 1e-5
    with pytest.raises(
        SieveError, match=r"has lm_head.weight of shape \(128, 32\), and the adapter's model has \(144, 32\)"
    ):
        merge_checkpoint(adapter.path, adapter.base_path, tmp_path / "again")
    adapter = trained(tmp_path / "b", ordinary=True, **options)
    with pytest.raises(SieveError, match=r"PEFT does not save base_model.model.lm_head.weight"):
        narrow_lora(adapter.model, tmp_path / "narrowed", MASK)
    assert not (tmp_path / "again").exists()
    assert not (tmp_path / "narrowed").exists()


def with_tensor(adapter: Adapter, folder: Path, key: str, value: torch.Tensor) -> Path:
    shutil.copytree(adapter.path, folder)
    tensors = {**load_file(folder / "adapter_model.safetensors"), key: value}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


ACTIONS: dict[str, Any] = {
    "export": export_lora,
    "merge": lambda path, output: merge_checkpoint(path, None, output),
    "narrow": lambda path, output: narrow_lora(path, output, MASK),
}


@pytest.mark.parametrize("action", ACTIONS)
def test_whatever_else_a_file_holds_is_refused_by_name(action: str, tmp_path: Path) -> None:
    adapter = trained(tmp_path, ordinary=action == "narrow")
    foreign = {
        "norm.weight": (torch.ones(32), ", a weight of the base model that is not one of its embeddings"),
        "layers.0.self_attn.q_proj.base_layer.weight": (torch.ones(32, 32), ", a weight of the base model"),
        "layers.0.self_attn.q_proj.lora_magnitude_vector": (torch.ones(32), ""),
        "embed_tokens.token_adapter.trainable_tokens_delta": (torch.ones(2, 32), ""),
        "layers.0.self_attn.o_proj.bias": (torch.ones(32), ""),
        "layers.0.self_attn.o_proj.lora_A.weight": (torch.ones(4, 32), ""),
    }
    for i, (name, (value, kind)) in enumerate(foreign.items()):
        path = with_tensor(adapter, tmp_path / str(i), f"base_model.model.model.{name}", value)
        with pytest.raises(SieveError, match=f"model.{name}{kind}"):
            ACTIONS[action](path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("action", ACTIONS)
def test_other_trained_weights_of_a_live_model_are_refused(action: str, tmp_path: Path) -> None:
    model = trained(tmp_path, ordinary=action == "narrow").model
    model.get_base_model().model.norm.requires_grad_()
    with pytest.raises(SieveError, match="model.norm.weight of the base model is trainable"):
        ACTIONS[action](model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tied_embeddings_that_differ_are_refused(tmp_path: Path) -> None:
    adapter = trained(tmp_path, rows=144, tied=True)
    path = with_tensor(adapter, tmp_path / "other", "base_model.model.lm_head.weight", torch.ones(144, 32))
    with pytest.raises(SieveError, match="different weights for .*lm_head.*, which the model ties"):
        merge_checkpoint(path, None, tmp_path / "out")


ODD = [
    Kimi_K25ForConditionalGeneration,  # tied, and the configuration of the text model says otherwise
    Qwen3VLMoeForConditionalGeneration,  # the other way round
    Nemotron3_5TranscribeForConditionalGeneration,  # another vocabulary of the same size
]


@pytest.mark.parametrize("model_class", ODD)
def test_models_of_several_parts(model_class: Any, tmp_path: Path) -> None:
    model, expected, batch = resized_model(model_class, tmp_path)
    merge_checkpoint(model, None, tmp_path / "merged")
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("base", "merged"))
    assert before["text_config"].pop("vocab_size") == 128
    assert after["text_config"].pop("vocab_size") == 144
    assert before == after
    with torch.no_grad():
        merged = model_class.from_pretrained(tmp_path / "merged").eval()(**batch).logits
    assert relative_difference(merged, expected) < 1e-4


def test_more_of_the_vocabularys_size_is_refused(tmp_path: Path) -> None:
    model, _, _ = resized_model(DeepseekV4ForCausalLM, tmp_path)
    with pytest.raises(SieveError, match=r"resized to 144, and model.layers.0.mlp.gate.tid2eid still has"):
        merge_checkpoint(model, None, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def resized_model(model_class: Any, folder: Path) -> tuple[PeftModel, torch.Tensor, dict[str, torch.Tensor]]:
    """An adapter on a model with another number of embeddings than its base in `folder / "base"`."""
    base = tiny_model_of(model_class).eval()
    base.save_pretrained(folder / "base")
    base.name_or_path = str(folder / "base")
    batch = inputs_for(base)
    base.resize_token_embeddings(144, mean_resizing=False)
    for end in (base.get_input_embeddings(), base.get_output_embeddings()):
        torch.nn.init.normal_(end.weight, std=0.2)
    mask = {layer.path: [0, 1] for layer in find_moe_layers(base)}
    model = get_peft_model(base, SieveLoraConfig(r=4, selected_experts=mask)).eval()
    randomize_adapters(model)
    with torch.no_grad():
        return model, model(**batch).logits, batch


def test_the_tokenizer_beside_the_adapter_goes_into_the_merged_checkpoint(tmp_path: Path) -> None:
    adapter = trained(tmp_path, rows=144)
    tokenizer = AutoTokenizer.from_pretrained(TINY_OLMOE)
    tokenizer.save_pretrained(adapter.base_path)
    (adapter.base_path / "chat_template.jinja").write_text("of the base")
    tokenizer.add_tokens(["<of the adapter>"])
    for template in (None, "of the adapter"):
        tokenizer.chat_template = template
        tokenizer.save_pretrained(adapter.path)
        merge_checkpoint(adapter.path, None, tmp_path / "merged")
        merged = AutoTokenizer.from_pretrained(tmp_path / "merged")
        assert merged.get_vocab() == tokenizer.get_vocab()
        assert "<of the adapter>" in merged.get_vocab()
        assert merged.chat_template == (template or "of the base")
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    merge_checkpoint(adapter.model, adapter.base_path, tmp_path / "of_model")
    assert "<of the adapter>" not in AutoTokenizer.from_pretrained(tmp_path / "of_model").get_vocab()

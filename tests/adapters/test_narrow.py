"""An ordinary LoRA narrowed to some experts: the same on those, nothing on the others, and what share is kept."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from peft_sieve import RoutingProfile, SieveError, SieveLoraConfig, export_lora, narrow_lora, select_experts
from peft_sieve.cli import main
from peft_sieve.moe.topology import find_moe_layers
from tests.adapters.saved import SHARED, relative_difference, saved_adapter
from tests.deepseek_like import deepseek_like
from tests.models import randomize_adapters, tiny_model, token_batch

MASK = {"model.layers.0.mlp.experts": [1, 6], "model.layers.1.mlp.experts": [0, 3, 4]}
WEIGHTS = "adapter_model.safetensors"
B = "base_model.model.model.layers.0.mlp.experts.lora_B.weight"
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@dataclass
class Full:
    """A LoRA on all experts, saved, and its model."""

    base: Any
    model: PeftModel
    path: Path
    batch: dict[str, torch.Tensor]

    def logits(self, model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(**self.batch).logits

    def without_cold(self, mask: dict[str, list[int]]) -> torch.Tensor:
        """What it computes with B of all other experts at zero."""
        model = copy.deepcopy(self.model)
        for path, module in model.get_base_model().named_modules():
            if getattr(module, "parameter_name", "") not in ("gate_up_proj", "down_proj"):
                continue
            b = module.lora_B["default"].weight.data.view(module.out_features, -1, module.num_experts)
            kept = mask.get(path.replace(".base_layer", ""), [])
            b[..., [e for e in range(module.num_experts) if e not in kept]] = 0
        return self.logits(model)

    def norms(self, mask: dict[str, list[int]]) -> tuple[float, float]:
        """Frobenius norms of what the experts of the mask get, and of what all get."""
        kept = whole = 0.0
        for path, module in self.model.get_base_model().named_modules():
            if getattr(module, "parameter_name", "") in ("gate_up_proj", "down_proj"):
                squares = module.get_delta_weight("default").detach().double().square().sum((1, 2))
                whole += float(squares.sum())
                kept += float(squares[mask.get(path.replace(".base_layer", ""), [])].sum())
        return kept**0.5, whole**0.5


def full_lora(folder: Path, name: str = "olmoe", **options: Any) -> Full:
    base = tiny_model(name)
    base.save_pretrained(folder / "base")
    base.name_or_path = str(folder / "base")
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "target_parameters": EXPERTS}
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**{**settings, "task_type": "CAUSAL_LM", **options}))
    randomize_adapters(model)
    model.save_pretrained(folder / "full")
    return Full(base, model.eval(), folder / "full", token_batch(base))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Full:
    return full_lora(tmp_path_factory.mktemp("olmoe"))


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe": ("olmoe", {}),
    "gpt_oss": ("gpt_oss", {}),  # transposed and interleaved
    "router": ("mixtral", {"target_parameters": [*EXPERTS, "mlp.gate.weight"]}),
    "some routers": ("olmoe", {"target_parameters": [*EXPERTS, "layers.1.mlp.gate.weight"]}),
    "only down": ("olmoe", {"target_parameters": ["mlp.experts.down_proj"], "use_rslora": True}),
    "uneven": ("olmoe", {"rank_pattern": {"experts.down_proj": 2, "q_proj": 3}, "alpha_pattern": {"v_proj": 9}}),
    "no attention": ("olmoe", {"target_modules": []}),
    "embeddings": ("olmoe", {"target_modules": ["embed_tokens", "q_proj"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_the_lora_does_on_the_experts_kept(case: str, tmp_path: Path) -> None:
    name, options = CASES[case]
    full = full_lora(tmp_path, name, **options)
    narrowed = narrow_lora(full.path, tmp_path / "sparse", MASK)
    config = json.loads((tmp_path / "sparse" / "adapter_config.json").read_text())
    assert config["peft_type"] == "SIEVE_LORA"
    assert config["selected_experts"] == MASK
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    model = PeftModel.from_pretrained(copy.deepcopy(full.base), tmp_path / "sparse")
    expected = full.without_cold(MASK)
    assert relative_difference(full.logits(full.model), expected) > 1e-3, "the cold experts hardly did anything"
    assert relative_difference(full.logits(model), expected) < 1e-5
    kept, whole = full.norms(MASK)
    assert narrowed.kept_norm == pytest.approx(kept / whole, rel=1e-5)
    assert (narrowed.num_kept, narrowed.num_experts) == (5, 16)


def test_routers_of_layers_without_a_kept_expert_stay(tmp_path: Path) -> None:
    full = full_lora(tmp_path, target_parameters=[*EXPERTS, "gate.weight"])
    mask = {path: ids for path, ids in MASK.items() if ".0." in path}
    narrow_lora(full.path, tmp_path / "sparse", mask)
    model = PeftModel.from_pretrained(copy.deepcopy(full.base), tmp_path / "sparse")
    assert relative_difference(full.logits(model), full.without_cold(mask)) < 1e-5


def test_a_pair_of_factors_per_expert_and_projection(tmp_path: Path) -> None:
    """As PEFT loads them, each projection has half of the stack's ranks for itself: no rank more is kept."""
    base = tiny_model("olmoe")
    base.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(base), config)
    randomize_adapters(model)
    for module in model.modules():
        if getattr(module, "parameter_name", "") == "gate_up_proj":
            b = module.lora_B["default"].weight.data.view(2, 24, 2, 4, 8)
            b[0, :, 1] = b[1, :, 0] = 0
    full = Full(base, model.eval(), tmp_path, token_batch(base))
    narrow_lora(model, tmp_path / "sparse", MASK)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "sparse")
    assert relative_difference(full.logits(loaded), full.without_cold(MASK)) < 1e-5
    layer = loaded.get_base_model().model.layers[0].mlp.experts
    assert layer.plans["default"].ranks == {"gate_proj": 4, "up_proj": 4, "down_proj": 4}


def test_experts_in_a_module_list(tmp_path: Path) -> None:
    base = deepseek_like()
    model = get_peft_model(
        copy.deepcopy(base), LoraConfig(r=4, target_modules="all-linear", exclude_modules=["lm_head"])
    )
    randomize_adapters(model)
    mask = {layer.path: [0, 2] for layer in find_moe_layers(base)}
    narrow_lora(model.eval(), tmp_path / "sparse", mask, base_model=base)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "sparse")
    for path, module in model.get_base_model().named_modules():
        within, _, index = path.rpartition(".")
        if within in mask and int(index) not in mask[within]:
            for linear in module.modules():
                if hasattr(linear, "lora_B"):
                    linear.lora_B["default"].weight.data.zero_()
    batch = token_batch(base)
    with torch.no_grad():
        assert relative_difference(loaded.eval()(**batch).logits, model(**batch).logits) < 1e-5


@pytest.mark.parametrize("layout", ["per_expert", "stacked"])
def test_an_export_of_what_experts_share_becomes_an_adapter_that_shares_nothing(layout: str, tmp_path: Path) -> None:
    adapter = saved_adapter(tmp_path, "olmoe", **SHARED["one layer whole"])
    export_lora(adapter.path, tmp_path / "lora", layout=layout)
    every = {layer.path: range(8) for layer in find_moe_layers(adapter.base)}
    assert narrow_lora(tmp_path / "lora", tmp_path / "sparse", every).kept_norm == pytest.approx(1)
    model = PeftModel.from_pretrained(adapter.fresh(), tmp_path / "sparse")
    config = model.peft_config["default"]
    assert (config.cold_experts, config.share_outer) == ("frozen", False)
    assert relative_difference(adapter.logits(model), adapter.logits()) < 1e-5
    # Of some experts: what they computed together, each for itself.
    some = {path: [1, 6] for path in every}
    narrow_lora(tmp_path / "lora", tmp_path / "some", some)
    kept = PeftModel.from_pretrained(adapter.fresh(), tmp_path / "some")
    theirs = {m.path: m for m in kept.modules() if hasattr(m, "plans")}
    for layer in (m for m in adapter.model.modules() if hasattr(m, "plans")):
        for expert in some[layer.path]:
            expected, found = (m.get_delta_weight("default", "down_proj", expert) for m in (layer, theirs[layer.path]))
            assert torch.allclose(found, expected, atol=1e-6)


# --- files that PEFT misreads ---------------------------------------------------------------------------------------


def rewritten(source: Path, folder: Path, change: Any, **config: Any) -> Path:
    """A saved LoRA with other tensors and other settings."""
    shutil.copytree(source, folder)
    save_file(change(load_file(source / WEIGHTS)), folder / WEIGHTS)
    content = json.loads((source / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**content, **config}))
    return folder


@pytest.mark.parametrize("name", ["olmoe", "mixtral"])
def test_factors_of_some_experts_only(name: str, tmp_path: Path) -> None:
    adapter = saved_adapter(tmp_path, name)
    mask: dict[str, list[int]] = adapter.model.peft_config["default"].selected_experts
    export_lora(adapter.path, tmp_path / "all", layout="per_expert")

    def adapted(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        # Whatever adds zero: the export has that for all experts.
        b = {key: t for key, t in tensors.items() if "lora_B" in key}
        cold = {key.removesuffix(".lora_B.weight") for key, t in b.items() if ".experts." in key and not t.any()}
        return {key: t for key, t in tensors.items() if key.rsplit(".", 2)[0] not in cold}

    some = rewritten(tmp_path / "all", tmp_path / "some", adapted)
    assert len(load_file(some / WEIGHTS)) < 0.5 * len(load_file(tmp_path / "all" / WEIGHTS))
    path = tmp_path / "mask.json"
    path.write_text(json.dumps(mask))
    assert main(["narrow", str(some), str(tmp_path / "narrowed"), "--mask", str(path)]) == 0
    model = PeftModel.from_pretrained(adapter.fresh(), tmp_path / "narrowed")
    assert relative_difference(adapter.logits(model), adapter.logits()) < 1e-5
    first, second = mask
    message = f"not have factors for all selected experts of {second} \\(none for 7, 1 such in all\\)"
    refused(message, some, tmp_path / "out", {first: mask[first], second: [*mask[second], 7]})

    def another_rank(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: t[:2].clone() if "experts.3" in key and "lora_A" in key else t for key, t in tensors.items()}

    broken = rewritten(tmp_path / "all", tmp_path / "broken", another_rank)
    refused("PEFT cannot stack the factors of the experts", broken, tmp_path / "out", mask)


def in_unsloths_order(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """B of stacks as (out, experts, ranks)."""
    return {
        key: t.unflatten(1, (-1, 8)).transpose(1, 2).flatten(1) if "experts" in key and "lora_B" in key else t
        for key, t in tensors.items()
    }


def test_b_in_the_order_that_unsloth_had(full: Full, tmp_path: Path) -> None:
    theirs = {"auto_mapping": {"base_model_class": "OlmoeForCausalLM", "unsloth_fixed": True}}
    grouped = rewritten(full.path, tmp_path / "a", in_unsloths_order, lora_B_layout="grouped_by_expert", **theirs)
    assert not torch.equal(*(load_file(path / WEIGHTS)[B] for path in (grouped, full.path)))
    of_peft = rewritten(full.path, tmp_path / "b", dict, lora_B_layout="rank_major", **theirs)
    for path in (grouped, of_peft):
        narrow_lora(path, tmp_path / "out" / path.name, MASK)
        model = PeftModel.from_pretrained(copy.deepcopy(full.base), tmp_path / "out" / path.name)
        assert relative_difference(full.logits(model), full.without_cold(MASK)) < 1e-5
    unknown = rewritten(full.path, tmp_path / "c", in_unsloths_order, **theirs)
    refused('lora_B_layout=None.*Write "lora_B_layout": "grouped_by_expert"', unknown, tmp_path / "d")
    mixed = rewritten(full.path, tmp_path / "e", dict, lora_B_layout="mixed")
    refused("lora_B_layout='mixed', which does not say", mixed, tmp_path / "d")
    # Without stacks of experts in the file there is no such order.
    export_lora(PeftModel.from_pretrained(copy.deepcopy(full.base), tmp_path / "out" / "a"), tmp_path / "pairs")
    pairs = rewritten(tmp_path / "pairs", tmp_path / "f", dict, **theirs)
    narrow_lora(pairs, tmp_path / "out" / "f", MASK)
    model = PeftModel.from_pretrained(copy.deepcopy(full.base), tmp_path / "out" / "f")
    assert relative_difference(full.logits(model), full.without_cold(MASK)) < 1e-5


def profile() -> RoutingProfile:
    counts = torch.arange(16).view(2, 8) ** 2
    return RoutingProfile.from_arrays(counts, num_experts_per_tok=3, layer_names=list(MASK))


def test_a_profile_selects_and_is_remembered(full: Full, tmp_path: Path) -> None:
    narrow_lora(full.path, tmp_path / "sparse", profile(), top_k=3, strategy="greedy")
    config = json.loads((tmp_path / "sparse" / "adapter_config.json").read_text())
    expected = select_experts(profile(), top_k=3, strategy="greedy")
    assert config["selected_experts"] == expected.to_dict()
    calibration = config["calibration"]
    assert calibration["strategy"] == "greedy"
    assert calibration["narrowed_from"] == str(full.path)
    coverage = expected.coverage(profile())
    assert calibration["coverage"] == {path: round(share, 4) for path, share in coverage.items()}
    kept, whole = full.norms(expected.to_dict())
    assert calibration["kept_norm"] == round(kept / whole, 4)
    assert "Sparse expert adapter" in (tmp_path / "sparse" / "README.md").read_text()


def test_all_experts_keep_the_whole_norm(full: Full, tmp_path: Path) -> None:
    narrowed = narrow_lora(full.path, tmp_path / "sparse", dict.fromkeys(MASK, range(8)))
    assert narrowed.kept_norm == pytest.approx(1)
    model = PeftModel.from_pretrained(copy.deepcopy(full.base), tmp_path / "sparse")
    assert relative_difference(full.logits(model), full.logits(full.model)) < 1e-5


# --- refused --------------------------------------------------------------------------------------------------------


def refused(match: str, lora: Any, output: Path, mask: Any = MASK, **options: Any) -> None:
    with pytest.raises(SieveError, match=match):
        narrow_lora(lora, output, mask, **options)
    assert not output.exists()


def test_masks_that_do_not_fit(full: Full, tmp_path: Path) -> None:
    output = tmp_path / "out"
    refused("holds the id 8, and that layer has 8 experts", full.path, output, {"model.layers.0.mlp.experts": [8]})
    refused("names 'layers.0', which the model does not have", full.path, output, {"layers.0": [1]})
    refused("experts must be a mask or a routing profile, got None", full.path, output, None)
    refused("top_k cannot go with a mask", full.path, output, top_k=2)
    refused("selected_experts does not name a single expert", full.path, output, {"model.layers.0.mlp.experts": []})


def test_loras_that_cannot_be_narrowed(full: Full, tmp_path: Path) -> None:
    output = tmp_path / "out"
    refused("No adapter can be read from", tmp_path / "nothing", output)
    refused("lora must be a PeftModel, .* got 3", 3, output)
    attention = get_peft_model(copy.deepcopy(full.base), LoraConfig(target_modules=["q_proj"]))
    refused("not have factors for all selected experts of model.layers.0.mlp.experts", attention, output)
    attention.save_pretrained(tmp_path / "attention")
    tiny_model("deepseek_v3").config.save_pretrained(tmp_path / "other")  # has no q_proj
    mismatch = r"does not fit .*other.*base_model"
    refused(mismatch, tmp_path / "attention", output, base_model=str(tmp_path / "other"))
    vera = get_peft_model(copy.deepcopy(full.base), VeraConfig(target_modules=["q_proj"]))
    refused("model holds an adapter of type VERA, not LORA", vera, output)
    sieve = get_peft_model(copy.deepcopy(full.base), SieveLoraConfig(selected_experts=MASK))
    refused("model holds an adapter of type SIEVE_LORA, not LORA", sieve, output)
    for options, what in (
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
    ):
        other = full_lora(tmp_path / what[:4], **options)
        refused(f"has {what}", other.path, output)


def test_weights_that_are_not_the_configurations(full: Full, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    for path in full.path.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj"]}))
    refused("weights have .*v_proj", folder, tmp_path / "out")
    (folder / "adapter_config.json").write_text(
        json.dumps({**config, "target_modules": ["q_proj", "v_proj", "o_proj"]})
    )
    refused("weights lack .*o_proj", folder, tmp_path / "out")


# --- command line ---------------------------------------------------------------------------------------------------


def test_command(full: Full, tmp_path: Path, capsys: Any) -> None:
    profile().save(tmp_path / "profile.safetensors")
    options = ["--profile", str(tmp_path / "profile.safetensors"), "--top-k-frac", "0.5"]
    assert main(["narrow", str(full.path), str(tmp_path / "a"), *options]) == 0
    assert f"sparse adapter in {tmp_path / 'a'}: 8 of 16 experts, " in capsys.readouterr().out
    # The mask of one adapter for another.
    assert (
        main(["narrow", str(full.path), str(tmp_path / "b"), "--mask", str(tmp_path / "a" / "adapter_config.json")])
        == 0
    )
    weights = [(tmp_path / folder / "adapter_model.safetensors").read_bytes() for folder in "ab"]
    assert weights[0] == weights[1]
    (tmp_path / "mask.json").write_text("{")
    assert main(["narrow", str(full.path), str(tmp_path / "c"), "--mask", str(tmp_path / "mask.json")]) == 1
    assert "mask cannot be read from" in capsys.readouterr().err

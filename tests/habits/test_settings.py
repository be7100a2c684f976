"""Every setting of `LoraConfig`: it works on experts and routers as on linear layers, or is refused by name."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import config as lora
from peft.tuners.lora.layer import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file, save_file
from torch import nn

from peft_sieve import SieveError, SieveLoraConfig
from peft_sieve.moe.topology import find_moe_layers
from peft_sieve.tuners.common.experts.layer import SieveExpertLayer
from tests.deepseek_like import deepseek_like
from tests.models import randomize_adapters, tiny_model, token_batch

TABLE = Path(__file__).parents[2] / "docs" / "peft-habits.md"
EXPERTS = "model.layers.{}.mlp.experts"


def config(base: nn.Module, ids: list[int] | None = None, **settings: Any) -> SieveLoraConfig:
    mask = dict.fromkeys((layer.path for layer in find_moe_layers(base)), [1, 4, 6] if ids is None else ids)
    return SieveLoraConfig(**{"r": 4, "lora_alpha": 8, "selected_experts": mask, "task_type": "CAUSAL_LM", **settings})


def adapted(base: nn.Module, **settings: Any) -> PeftModel:
    return get_peft_model(base, config(base, **settings))


def layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Adapter layers by their paths in the base model."""
    return {path.removeprefix("base_model.model."): m for path, m in model.named_modules() if isinstance(m, LoraLayer)}


def trained_and_loaded(model: PeftModel, make_base: Callable[[], nn.Module], folder: Path) -> PeftModel:
    """One step, saved, and loaded onto a fresh base: the outputs are the same to the bit."""
    randomize_adapters(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.1)
    batch = token_batch(model)
    model.train()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in trainable)
    optimizer.step()
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(make_base(), folder)
    with torch.no_grad():
        logits = model.eval()(**batch).logits
        assert torch.equal(loaded(**batch).logits, logits)
        assert not torch.allclose(logits, make_base()(**batch).logits, atol=1e-3)
    return loaded


# The table


def test_the_table_decides_every_field_once() -> None:
    settings = TABLE.read_text().split("\n## ")[1]
    rows = re.findall(r"^\| `(\w+)` \| (works|refused|no effect) \|", settings, flags=re.MULTILINE)
    names = [name for name, _ in rows]
    assert sorted(names) == sorted(field.name for field in dataclasses.fields(LoraConfig))
    refused = {name for name, verdict in rows if verdict == "refused"}
    assert refused == {*REFUSED, "target_parameters"}


REFUSED: dict[str, Any] = {
    "fan_in_fan_out": True,
    "use_dora": True,
    "lora_bias": True,
    "use_qalora": True,
    "use_bdlora": lora.BdLoraConfig(),
    "megatron_config": {"a": 1},
    "layer_replication": [(0, 2)],
    "alora_invocation_tokens": [1, 2],
    "velora_config": lora.VeloraConfig(),
    "kasa_config": lora.KasaConfig(),
    "monteclora_config": lora.MontecloraConfig(),
    "arrow_config": lora.ArrowConfig(),
    "eva_config": lora.EvaConfig(),
    "corda_config": lora.CordaConfig(),
    "lora_ga_config": lora.LoraGAConfig(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_of_other_methods_are_refused_by_name(name: str) -> None:
    with pytest.raises(SieveError, match=f"^{name}=.*not supported.*Leave it at"):
        SieveLoraConfig(**{name: REFUSED[name]})


# Ranks and scalings


def test_rank_and_alpha_patterns_by_layer_and_by_projection(tmp_path: Path) -> None:
    ranks = {
        "q_proj": 2,
        "layers.1.self_attn.v_proj": 3,
        "gate": 1,
        r"layers.0.mlp.experts": 6,
        r"layers\.1\.mlp\.experts\.down_proj": 5,
        "gate_up_proj": 3,
    }
    alphas = {"layers.1.mlp.experts.up_proj": 12, "q_proj": 1, r".*layers.0.mlp.gate": 3}
    base = tiny_model("olmoe")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model = adapted(base, rank_pattern=ranks, alpha_pattern=alphas)
    assert not [w for w in seen if "_pattern" in str(w.message)]
    found = layers(model)
    for path in (EXPERTS.format(0), EXPERTS.format(1)):
        assert isinstance(found[path], SieveExpertLayer)
    first, second = (found[EXPERTS.format(index)].plans["default"] for index in range(2))
    # The most exact name counts: a projection, then its parameter, then the layer.
    assert first.ranks == {"gate_proj": 3, "up_proj": 3, "down_proj": 6}
    assert second.ranks == {"gate_proj": 3, "up_proj": 3, "down_proj": 5}
    experts = found[EXPERTS.format(1)]
    assert experts.lora_gate_up_A["default"].weight.shape == (3, 6, 32)
    assert experts.lora_down_B["default"].weight.shape == (3, 5, 32)
    scalings = {p: experts.factors("default", p)[2] for p in second.ranks}
    assert scalings == pytest.approx({"gate_proj": 8 / 3, "up_proj": 12 / 3, "down_proj": 8 / 5})
    assert {p: m.r["default"] for p, m in found.items() if "experts" not in p} == {
        f"model.layers.{i}.{part}": rank
        for i in range(2)
        for part, rank in (
            ("self_attn.q_proj", 2),
            ("self_attn.k_proj", 4),
            ("self_attn.v_proj", (4, 3)[i]),
            ("self_attn.o_proj", 4),
            ("mlp.gate", 1),
        )
    }
    assert found["model.layers.0.mlp.gate"].scaling["default"] == 3
    assert found["model.layers.1.self_attn.q_proj"].scaling["default"] == 0.5
    trained_and_loaded(model, lambda: tiny_model("olmoe"), tmp_path)


def test_a_pattern_that_matches_nothing_adapted_is_told() -> None:
    """A name of a projection or a router that is left out counts as nothing, too."""
    text = r"rank_pattern .*'up_proj', 'mlp.gate', 'nope'.* match nothing"
    settings = {"expert_projections": ["down_proj"], "train_router": False}
    with pytest.warns(RuntimeWarning, match=text) as seen:
        adapted(
            tiny_model("olmoe"), rank_pattern=dict.fromkeys(("q_proj", "up_proj", "mlp.gate", "nope"), 2), **settings
        )
    assert len([w for w in seen if "_pattern" in str(w.message)]) == 1


def test_rslora_scales_every_adapter(tmp_path: Path) -> None:
    model = adapted(tiny_model("qwen2_moe"), use_rslora=True, rank_pattern={"down_proj": 16})
    for path, layer in layers(model).items():
        if isinstance(layer, SieveExpertLayer):
            scalings = {p: layer.factors("default", p)[2] for p in layer.shape.projections}
            assert scalings == pytest.approx({"gate_proj": 4.0, "up_proj": 4.0, "down_proj": 2.0})
        else:
            assert layer.scaling["default"] == (2.0 if path.endswith("down_proj") else 4.0)
    trained_and_loaded(model, lambda: tiny_model("qwen2_moe"), tmp_path)


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_initial_values(init: bool | str) -> None:
    base = tiny_model("olmoe")
    batch = token_batch(base)
    with torch.no_grad():
        before = base(**batch).logits
    torch.manual_seed(0)
    model = adapted(base, init_lora_weights=init, r=16).eval()
    with torch.no_grad():
        # False is there for debugging: an adapter that does something.
        assert torch.equal(model(**batch).logits, before) == (init is not False)
    layer = layers(model)[EXPERTS.format(0)]
    a, b = (layer.factors("default", "up_proj")[i].detach() for i in range(2))
    assert b.any() == (init is False)
    assert a.std() == pytest.approx(1 / 16 if init == "gaussian" else (1 / 32**0.5) / 3**0.5, rel=0.1)


# Where


@pytest.mark.parametrize("calibrated", [False, True])
def test_layers_to_transform_apply_to_everything(calibrated: bool, tmp_path: Path) -> None:
    base = tiny_model("olmoe")
    source: dict[str, Any] = {"selected_experts": None, "calib_dataset": [token_batch(base)]} if calibrated else {}
    for settings in ({"layers_to_transform": [1]}, {"layers_to_transform": 1, "layers_pattern": "layers"}):
        model = adapted(tiny_model("olmoe"), **settings, **source)
        assert list(model.peft_config["default"].selected_experts) == [EXPERTS.format(1)]
        found = layers(model)
        assert {path.split(".")[2] for path in found} == {"1"}
        assert {path.rpartition(".")[2] for path in found} == {*(f"{p}_proj" for p in "qkvo"), "experts", "gate"}
    trained_and_loaded(model, lambda: tiny_model("olmoe"), tmp_path)


@pytest.mark.parametrize(
    ("excluded", "gone"),
    [
        (["experts"], None),
        (["layers.0.mlp.experts"], {EXPERTS.format(0), "model.layers.0.mlp.gate"}),
        (r".*layers\.0\.mlp\..*", {EXPERTS.format(0), "model.layers.0.mlp.gate"}),
        (["gate", "q_proj"], {f"model.layers.{i}.{p}" for i in range(2) for p in ("mlp.gate", "self_attn.q_proj")}),
        (["layers.1.mlp.gate"], {"model.layers.1.mlp.gate"}),
    ],
)
def test_excluded_modules_are_left_out(excluded: Any, gone: set[str] | None) -> None:
    """A router without experts beside it is left alone, too."""
    base = tiny_model("olmoe")
    if gone is None:
        with pytest.raises(SieveError, match=r"exclude_modules=.*'experts'.* none of the 2 MoE layers"):
            adapted(base, exclude_modules=excluded)
        assert layers(base) == {}
        return
    everything = set(layers(adapted(tiny_model("olmoe"))))
    assert set(layers(adapted(base, exclude_modules=excluded))) == everything - gone


def test_an_excluded_projection_is_one_of_the_experts_too(tmp_path: Path) -> None:
    model = adapted(tiny_model("qwen2_moe"), exclude_modules=["layers.0.mlp.experts.down_proj", "up_proj"])
    found = layers(model)
    assert list(found[EXPERTS.format(0)].plans["default"].ranks) == ["gate_proj"]
    assert list(found[EXPERTS.format(1)].plans["default"].ranks) == ["gate_proj", "down_proj"]
    assert "model.layers.0.mlp.shared_expert.down_proj" in found
    assert "model.layers.0.mlp.shared_expert.up_proj" not in found
    trained_and_loaded(model, lambda: tiny_model("qwen2_moe"), tmp_path)


def test_excluded_experts_in_a_list_get_no_plain_adapter_either() -> None:
    base = deepseek_like()
    path = next(layer.path for layer in find_moe_layers(base))
    model = adapted(base, exclude_modules=[path], target_modules="all-linear")
    found = layers(model)
    assert not any(p == path or p.startswith(path + ".") for p in found)
    assert any(isinstance(layer, SieveExpertLayer) for layer in found.values())


# Beside the adapters


@pytest.mark.parametrize(
    ("modules", "without"),
    [
        (["lm_head"], None),
        (["embed_tokens", "norm"], None),
        # Trained in full, so no adapter is on them.
        (["gate"], "gate"),
        (["layers.0.mlp"], "layers.0.mlp"),
    ],
)
def test_modules_to_save(modules: list[str], without: str | None, tmp_path: Path) -> None:
    model = adapted(tiny_model("olmoe"), modules_to_save=modules)
    saved = {path for path, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)}
    assert {any(path.endswith(f".{module}") for path in saved) for module in modules} == {True}
    if without is not None:
        assert not any(f".{without}." in f"{path}." for path in layers(model))
    loaded = trained_and_loaded(model, lambda: tiny_model("olmoe"), tmp_path)
    trained = {name: p for name, p in model.named_parameters() if "modules_to_save" in name}
    values = dict(loaded.named_parameters())
    assert trained and all(torch.equal(values[name], p) for name, p in trained.items())


def test_trainable_token_indices(tmp_path: Path) -> None:
    base = tiny_model("olmoe")
    before = base.get_input_embeddings().weight.detach().clone()
    batch = token_batch(base)
    token = int(batch["input_ids"][0, 0])
    model = adapted(base, trainable_token_indices=[token])
    trained_and_loaded(model, lambda: tiny_model("olmoe"), tmp_path)
    after = model.merge_and_unload().get_input_embeddings().weight
    assert {int(i) for i in (after != before).any(1).nonzero()} == {token}


def test_broken_weights_beside_trained_tokens_leave_the_base_as_it_was(tmp_path: Path) -> None:
    adapted(tiny_model("olmoe"), trainable_token_indices=[3]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if "q_proj" not in key}, file)
    base = tiny_model("olmoe")
    before = [name for name, _ in base.named_modules()]
    with pytest.raises(SieveError, match="q_proj"):
        PeftModel.from_pretrained(base, tmp_path)
    assert [name for name, _ in base.named_modules()] == before


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss"])
def test_biases(name: str, bias: str, tmp_path: Path) -> None:
    """Those of linear layers and routers; the biases inside a stack of experts are no modules' and stay."""
    model = adapted(tiny_model(name), bias=bias)
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    assert trained and all(n.endswith("bias") and "experts" not in n for n in trained)
    trained_and_loaded(model, lambda: tiny_model(name), tmp_path)


@pytest.mark.parametrize("setting", [{"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": [5, 7]}])
def test_tied_weights_stay_tied(setting: dict[str, Any], tmp_path: Path) -> None:
    def make() -> nn.Module:
        return tiny_model("olmoe", tie_word_embeddings=True)

    model = adapted(make(), ensure_weight_tying=True, **setting)
    loaded = trained_and_loaded(model, make, tmp_path)
    for one in (model, loaded):
        merged = one.merge_and_unload()
        assert torch.equal(merged.get_input_embeddings().weight, merged.get_output_embeddings().weight)
        assert not torch.equal(merged.get_input_embeddings().weight, make().get_input_embeddings().weight)


def test_adapted_embeddings(tmp_path: Path) -> None:
    model = adapted(tiny_model("olmoe"), target_modules=["embed_tokens", "lm_head", "q_proj"])
    assert {"model.embed_tokens", "lm_head"} < set(layers(model))
    trained_and_loaded(model, lambda: tiny_model("olmoe"), tmp_path)


def test_without_effect_and_without_harm(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="loftq_config"):
        settings = config(tiny_model("olmoe"), loftq_config={"loftq_bits": 4}, qalora_group_size=8)
    settings.runtime_config.ephemeral_gpu_offload = True
    trained_and_loaded(get_peft_model(tiny_model("olmoe"), settings), lambda: tiny_model("olmoe"), tmp_path)

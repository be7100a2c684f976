"""The life of an adapter: made, counted, saved, loaded, switched, taken out; and what is refused on the way."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import hotswap
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peft_sieve import PerftConfig, SieveError, profile_routing, select_experts
from peft_sieve.tuners.perft.layer import perft_layers
from tests.models import TINY_OLMOE, small_olmoe, small_tokenizer, tiny_model, token_batch
from tests.paper_models import OLMOE
from tests.tuners.perft.adapted import MASK, adapted, config, first_layer, logits, randomize

VARIANTS = ["R", "E", "D", "S"]
WEIGHTS = "adapter_model.safetensors"


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_new_adapter_changes_nothing_and_unload_gives_the_base_back(variant: str) -> None:
    base = tiny_model("olmoe")
    batch, before, state = token_batch(base), logits(base, token_batch(base)), copy.deepcopy(base.state_dict())
    modules = [name for name, _ in base.named_modules()]
    model = get_peft_model(base, config(variant))
    assert torch.equal(logits(model, batch), before)
    randomize(model)
    assert not torch.allclose(logits(model, batch), before, atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), before)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(SieveError, match=r"merged.*unload\(\)"):
            merge()
    assert not torch.allclose(logits(model, batch), before, atol=1e-2)
    base = model.unload()
    assert torch.equal(logits(base, batch), before)
    assert [name for name, _ in base.named_modules()] == modules
    assert all(torch.equal(value, state[name]) for name, value in base.state_dict().items())
    hooks = [m for m in base.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks and not hasattr(base, "peft_config")
    assert torch.equal(logits(adapted(variant, base), batch), logits(adapted(variant), batch))


@pytest.mark.parametrize("form", ["lora", "bottleneck"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_and_loaded_to_the_bit(variant: str, form: str, tmp_path: Path) -> None:
    settings = {"selected_experts": MASK} if variant == "E" else {}
    model = adapted(variant, form=form, **settings)
    batch = token_batch(model)
    expected = logits(model, batch)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("olmoe"), str(tmp_path))
    assert torch.equal(logits(loaded, batch), expected)
    lean = PeftModel.from_pretrained(tiny_model("olmoe"), str(tmp_path), low_cpu_mem_usage=True)
    assert torch.equal(logits(lean, batch), expected)
    native = tiny_model("olmoe")
    native.load_adapter(str(tmp_path))
    assert torch.equal(logits(native, batch), expected)
    read, written = PeftConfig.from_pretrained(str(tmp_path)), model.peft_config["default"]
    changes = {"inference_mode": True, "task_type": written.task_type}
    assert read.to_dict() == {**written.to_dict(), **changes}
    names = set(load_file(tmp_path / WEIGHTS))
    assert {name.split(".perft.")[1].split(".")[0] for name in names} >= (
        {"perft_A", "perft_B"} if form == "lora" else {"perft_down", "perft_up"}
    )


# Weights of what is listed, loaded into what is listed, are refused.
OTHERS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"variant": "R"}, {"variant": "D"}, "perft_router"),
    ({"variant": "D"}, {"variant": "R"}, "perft_router"),
    ({"variant": "D"}, {"variant": "D", "num_adapters": 4}, "shape"),
    ({"variant": "D"}, {"variant": "D", "form": "bottleneck"}, "perft_"),
    ({"variant": "E"}, {"variant": "D", "num_adapters": 8}, "perft_experts"),
    ({"variant": "D"}, {"variant": "D", "layers_to_transform": [0]}, "layers.1"),
    (
        {"variant": "E", "selected_experts": MASK},
        {
            "variant": "E",
            "selected_experts": {path: [ids[0] + 3, *ids[1:]] if len(ids) == 2 else ids for path, ids in MASK.items()},
        },
        r"belong to experts \[0, 5\]",
    ),
]


@pytest.mark.parametrize(("saved", "own", "text"), OTHERS)
def test_weights_of_another_adapter_are_refused(saved: Any, own: Any, text: str, tmp_path: Path) -> None:
    adapted(**saved).save_pretrained(tmp_path)
    model = adapted(**own)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(SieveError, match=text):
        model.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_several_adapters_of_different_kinds_take_turns() -> None:
    model = adapted("R")
    batch = token_batch(model)
    expected = {"default": logits(model, batch)}
    for name, settings in (
        ("embedded", {"variant": "E", "selected_experts": MASK}),
        ("one", {"variant": "S", "layers_to_transform": [1]}),
    ):
        model.add_adapter(name, config(**settings))
        randomize(model)
        expected["default"] = logits(model, batch)
        model.set_adapter(name)
        expected[name] = logits(model, batch)
        trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trainable and all(f".{name}." in n for n in trainable)
        model.set_adapter("default")
    for name in ("one", "embedded", "default"):
        model.set_adapter(name)
        assert torch.equal(logits(model, batch), logits(alone(model, name), batch)), name
    status = {layer.name: layer for layer in model.get_layer_status()}
    assert status["model.model.layers.0.mlp.perft"].available_adapters == ["default", "embedded"]
    assert model.get_model_status().active_adapters == ["default"]
    before = logits(model, batch)
    model.delete_adapter("embedded")
    assert torch.equal(logits(model, batch), before)
    assert not [name for name, _ in model.named_parameters() if "embedded" in name]


def alone(model: PeftModel, name: str) -> PeftModel:
    """The tiny model with one adapter only, of the same values."""
    single = get_peft_model(tiny_model("olmoe"), copy.deepcopy(model.peft_config[name]))
    own = model.state_dict()
    for key, value in single.state_dict().items():
        value.copy_(own[key.replace(".default", f".{name}")])
    return single


def test_two_active_adapters_add_up() -> None:
    model = adapted("D")
    model.add_adapter("other", config("S"))
    randomize(model)
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    layer, parts = first_layer(model), []
    for names in ("default", "other", ["default", "other"]):
        model.base_model.set_adapter(names)
        parts.append(layer(x))
    assert torch.allclose(parts[2], parts[0] + parts[1], rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_models_have_float32_adapters_and_train(variant: str) -> None:
    model = adapted(variant, tiny_model("olmoe", dtype=torch.bfloat16))
    tensors = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in tensors.values()} == {torch.float32}
    batch = token_batch(model)
    out = model.train()(**batch, labels=batch["input_ids"])
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in tensors.values())
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch, labels=batch["input_ids"]).loss.backward()
    half = get_peft_model(tiny_model("olmoe", dtype=torch.bfloat16), config(variant), autocast_adapter_dtype=False)
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.bfloat16}
    assert torch.isfinite(logits(half, batch)).all()


# OLMoE-1B-7B: 16 layers, width 2048, 64 experts. A layer of R has N * 2 * r * d in its adapters and N * d in a router.
SIZES = [
    ({"variant": "R", "num_adapters": 8, "r": 16}, 16 * (8 * 2 * 16 * 2048 + 8 * 2048)),
    ({"variant": "R", "num_adapters": 8, "r": 16, "form": "bottleneck"}, 16 * (8 * 2 * 16 * 2048 + 8 * 2048)),
    ({"variant": "E", "r": 4}, 16 * 64 * 2 * 4 * 2048),
    ({"variant": "D", "num_adapters": 4, "r": 8}, 16 * 4 * 2 * 8 * 2048),
    ({"variant": "S", "r": 32}, 16 * 2 * 32 * 2048),
]


@pytest.mark.parametrize(("settings", "expected"), SIZES)
def test_sizes_on_olmoe(settings: dict[str, Any], expected: int, capsys: pytest.CaptureFixture[str]) -> None:
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(OLMOE)
    model = get_peft_model(base, PerftConfig(**settings))
    assert model.get_nb_trainable_parameters()[0] == expected
    model.print_trainable_parameters()
    assert f"trainable params: {expected:,}" in capsys.readouterr().out


# Selecting experts


def test_embedded_adapters_for_the_hot_experts_only(tmp_path: Path) -> None:
    texts = ["Tom has three apples and buys two more.", "How many pens does each of 4 friends get?"]
    model = get_peft_model(small_olmoe(), PerftConfig(variant="E", r=2, calib_dataset=texts, top_k_frac=0.25))
    expected = select_experts(profile_routing(small_olmoe(), texts, tokenizer=small_tokenizer(), progress=False))
    own = model.peft_config["default"]
    assert own.selected_experts == {path: list(ids) for path, ids in expected.to_dict().items()}
    assert own.calibration["samples"] == 2
    for layer in perft_layers(model):
        assert layer.perft_A["default"].weight.shape == (8, 2, 128) or layer.width != 128
        assert layer.perft_A["default"].weight.shape[0] == 8
    assert pickle.loads(pickle.dumps(copy.deepcopy(own))).selected_experts == own.selected_experts
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["selected_experts"] == own.selected_experts
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(TINY_OLMOE), str(tmp_path))
    assert loaded.peft_config["default"].calibration == own.calibration


def test_a_mask_for_some_layers_leaves_the_others_out() -> None:
    mask = {"model.layers.1.mlp.experts": [3]}
    model = adapted("E", selected_experts=mask)
    assert [layer.path for layer in perft_layers(model)] == ["model.layers.1.mlp"]


@pytest.mark.parametrize(
    ("settings", "paths"),
    [
        ({"layers_to_transform": [1]}, ["model.layers.1.mlp"]),
        ({"variant": "E", "selected_experts": MASK, "layers_to_transform": [1]}, ["model.layers.1.mlp"]),
        ({"exclude_modules": ["layers.1.mlp"]}, ["model.layers.0.mlp"]),
        ({"target_modules": ["layers.0.mlp"]}, ["model.layers.0.mlp"]),
        ({"target_modules": r".*\.1\.mlp"}, ["model.layers.1.mlp"]),
    ],
)
def test_some_blocks_only(settings: dict[str, Any], paths: list[str], tmp_path: Path) -> None:
    model = adapted(**{"variant": "R", **settings})
    assert [layer.path for layer in perft_layers(model)] == paths
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("olmoe"), str(tmp_path))
    assert [layer.path for layer in perft_layers(loaded)] == paths
    assert torch.equal(logits(loaded, token_batch(model)), logits(model, token_batch(model)))


# What is refused


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"variant": "X"}, "variant .*'R', 'E', 'D', 'S'.*'X'"),
        ({"form": "wide"}, "form .*'lora', 'bottleneck'.*'wide'"),
        ({"r": 0}, r"^r .*positive whole number.*\b0\b"),
        ({"lora_alpha": 0}, r"lora_alpha .*\b0\b"),
        ({"lora_dropout": 1.0}, r"lora_dropout .*1\.0"),
        ({"balance_loss_coef": -0.1}, r"balance_loss_coef .*-0\.1"),
        ({"activation": "nothing"}, "activation .*'nothing'"),
        ({"num_adapters": 2, "num_adapters_per_tok": 3}, r"num_adapters_per_tok .*\b[23]\b.*\b[23]\b"),
        ({"variant": "S", "num_adapters": 2}, "num_adapters .*2.*variant S|num_adapters .*variant.*S.*2"),
        ({"variant": "E", "num_adapters": 2}, "num_adapters .*2.*variant E|num_adapters .*variant.*E.*2"),
        ({"variant": "D", "num_adapters_per_tok": 1}, "num_adapters_per_tok .*1.* R|num_adapters_per_tok .*R.*1"),
        ({"selected_experts": MASK}, "selected_experts.*variant E"),
        ({"variant": "D", "calib_dataset": ["text"]}, "selected_experts.*variant E"),
        ({"variant": "E", "selected_experts": {"model.layers.0.mlp.experts": [-1]}}, "negative id"),
        ({"variant": "E", "top_k_frac": 2.0, "calib_dataset": ["text"]}, "top_k_frac"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(SieveError, match=text):
        PerftConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"variant": "E", "selected_experts": {"model.layers.7.mlp.experts": [1]}},
            "model.layers.7.mlp.experts.*does not have",
        ),
        (
            {"variant": "E", "selected_experts": {"model.layers.0.mlp.experts": [8]}},
            r"model.layers.0.mlp.experts.*\bid 8\b",
        ),
        ({"layers_to_transform": [5]}, r"layers_to_transform=\[5\].* none of the model's 2 MoE blocks"),
        ({"target_modules": ["q_proj"]}, "target_modules=.*q_proj.* none of"),
        (
            {"variant": "E", "selected_experts": {"model.layers.0.mlp.experts": [1]}, "layers_to_transform": [1]},
            "selected_experts.*model.layers.0.mlp.experts.*model.layers.1.mlp",
        ),
    ],
)
def test_settings_that_do_not_fit_the_model(settings: dict[str, Any], text: str) -> None:
    base = tiny_model("olmoe")
    modules = [name for name, _ in base.named_modules()]
    with pytest.raises(SieveError, match=text):
        get_peft_model(base, PerftConfig(**settings))
    assert [name for name, _ in base.named_modules()] == modules


def test_weighted_sums_mixed_batches_and_hot_swapping_are_refused(tmp_path: Path) -> None:
    model = adapted("S").eval()
    with pytest.raises(SieveError, match="PERFT adapters have no weighted sum.*set_adapter"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    with pytest.raises(SieveError, match="adapter_names"):
        model(**token_batch(model), adapter_names=["default"] * 3)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="PERFT"):
        hotswap.hotswap_adapter(model, str(tmp_path), "default")


def test_generation_goes_through_the_adapters() -> None:
    model = adapted("E").eval()
    batch = token_batch(model, batch=1, length=4)
    cached = model.generate(**batch, max_new_tokens=5, do_sample=False)
    assert torch.equal(cached, model.generate(**batch, max_new_tokens=5, do_sample=False, use_cache=False))
    with model.disable_adapter():
        assert not torch.equal(cached, model.generate(**batch, max_new_tokens=5, do_sample=False))


def broken_copy(folder: Path) -> None:
    """An adapter on disk of which a tensor is missing."""
    adapted("R").save_pretrained(folder)
    weights = load_file(folder / WEIGHTS)
    weights.pop(sorted(weights)[0])
    save_file(weights, folder / WEIGHTS)


@pytest.mark.parametrize("how", ["peft", "transformers"])
def test_a_base_model_is_left_as_it_was_when_weights_are_refused(how: str, tmp_path: Path) -> None:
    broken_copy(tmp_path)
    base = tiny_model("olmoe")
    batch = token_batch(base)
    expected, modules = logits(base, batch), [name for name, _ in base.named_modules()]
    with pytest.raises(SieveError, match=r"(?=.*layers.0.mlp.perft.perft_A)(?=.*adapter 'default')"):
        PeftModel.from_pretrained(base, str(tmp_path)) if how == "peft" else base.load_adapter(str(tmp_path))
    assert [name for name, _ in base.named_modules()] == modules
    assert not [m for m in base.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert all(p.requires_grad for p in base.parameters()) and not hasattr(base, "peft_config")
    assert torch.equal(logits(base, batch), expected)
    assert torch.equal(logits(adapted("R", base), batch), logits(adapted("R"), batch))


def test_other_adapters_stay_when_weights_are_refused(tmp_path: Path) -> None:
    broken_copy(tmp_path)
    model = adapted("S")
    batch = token_batch(model)
    expected, tensors = logits(model, batch), {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(SieveError, match="no .*layers.0.mlp.perft.perft_A.* adapter 'other'"):
        model.load_adapter(str(tmp_path), "other")
    assert {name: p.requires_grad for name, p in model.named_parameters()} == tensors
    assert set(model.peft_config) == {"default"} and torch.equal(logits(model, batch), expected)


def test_weights_of_other_experts_than_the_configuration_says_are_refused_by_transformers_too(tmp_path: Path) -> None:
    adapted("E", selected_experts=MASK).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    written["selected_experts"]["model.layers.1.mlp.experts"] = [3, 5]
    (tmp_path / "adapter_config.json").write_text(json.dumps(written))
    for load in (lambda base: base.load_adapter(str(tmp_path)), lambda base: PeftModel.from_pretrained(base, tmp_path)):
        base = tiny_model("olmoe")
        with pytest.raises(SieveError, match=r"belong to experts \[0, 5\] of model.layers.1.*has \[3, 5\]"):
            load(base)
        assert not perft_layers(base)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_model_card_says_what_it_is_and_how_to_load_it(variant: str, tmp_path: Path) -> None:
    settings = {"selected_experts": MASK} if variant == "E" else {}
    model = adapted(variant, **settings)
    for _ in range(2):
        model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.text.count("import peft_sieve") == 1 and "arXiv 2508.02587" in card.text
    said = {"R": "5 adapters, of which a router picks 2", "E": "5 of 16 experts", "D": "5 adapters", "S": "one adapter"}
    assert said[variant] in card.text and f"{model.get_nb_trainable_parameters()[0]:,} parameters" in card.text
    assert {"perft", "peft_sieve"} <= set(card.data["tags"]) and "lora" not in card.data["tags"]
    assert "Model Card for Model ID" not in card.text

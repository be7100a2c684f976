"""Models that torch.compile, activation checkpointing or data parallelism wrapped: names are those without wrappers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from peft_sieve import EpngConfig, LoraMoeConfig, PerftConfig, SieveError, SieveLoraConfig, profile_routing
from peft_sieve.training.warm_up import warm_up_profile
from tests.models import small_olmoe, tiny_model, token_batch

MASK = {"model.layers.0.mlp.experts": [1, 5], "model.layers.1.mlp.experts": [0, 2]}
BATCH = token_batch(tiny_model("olmoe"))


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def compiled_layers(model: Any) -> Any:
    model.model.layers = nn.ModuleList(map(compiled, model.model.layers))
    return model


def compiled_blocks(model: Any) -> Any:
    model.model.layers[0].mlp = compiled(model.model.layers[0].mlp)
    model.model.layers[1].mlp.experts = compiled(model.model.layers[1].mlp.experts)
    return model


def compiled_in_place(model: Any) -> Any:
    model.compile(backend="eager")
    model.model.layers[0].compile(backend="eager")
    return model


def checkpointed(model: Any) -> Any:
    model.model.layers = nn.ModuleList(map(checkpoint_wrapper, model.model.layers))
    return model


COMPILED: dict[str, Callable[[Any], Any]] = {
    "model": compiled,
    "layers": compiled_layers,
    "blocks": compiled_blocks,
    "in place": compiled_in_place,
    "model and layers": lambda model: compiled(compiled_layers(model)),
}
METHODS: dict[str, Callable[[], Any]] = {
    "sieve": lambda: SieveLoraConfig(r=4, top_k=2, calib_dataset=[BATCH], lora_dropout=0.0, task_type="CAUSAL_LM"),
    "epng": lambda: EpngConfig(r=4, top_k=2, calib_dataset=[BATCH], lora_dropout=0.0, task_type="CAUSAL_LM"),
    "perft routed": lambda: PerftConfig(r=4, task_type="CAUSAL_LM"),
    "perft": lambda: PerftConfig(r=4, variant="E", top_k_frac=0.5, calib_dataset=[BATCH], task_type="CAUSAL_LM"),
    "lora_moe": lambda: LoraMoeConfig(r=4, lora_dropout=0.0, task_type="CAUSAL_LM"),
}


def trained(base: Any, config: Any) -> Any:
    model = get_peft_model(base, config)
    fill(model)
    return model.eval()


def fill(model: Any, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1, generator=generator)


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # names are the same, and nothing has to be compiled
def logits(model: Any) -> torch.Tensor:
    return model(**BATCH).logits


@pytest.mark.parametrize(
    ("method", "way"), [*(("sieve", way) for way in COMPILED), *((method, "model and layers") for method in METHODS)]
)
def test_an_adapter_of_a_compiled_model_loads_on_a_plain_one(method: str, way: str, tmp_path: Path) -> None:
    expected = logits(trained(tiny_model("olmoe"), METHODS[method]()))
    model = trained(COMPILED[way](tiny_model("olmoe")), METHODS[method]())
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert saved and not any(
        "_orig_mod" in text for text in (*saved, Path(tmp_path, "adapter_config.json").read_text())
    )
    plain = PeftModel.from_pretrained(tiny_model("olmoe"), tmp_path).eval()
    again = PeftModel.from_pretrained(COMPILED[way](tiny_model("olmoe")), tmp_path).eval()
    for one in (model, plain, again):
        assert torch.allclose(logits(one), expected, atol=1e-5)
    assert not torch.allclose(expected, logits(tiny_model("olmoe")), atol=1e-2)


@pytest.mark.parametrize("way", COMPILED)
def test_it_stays_compiled(way: str) -> None:
    model = get_peft_model(COMPILED[way](tiny_model("olmoe")), SieveLoraConfig(r=4, selected_experts=MASK))
    for one in (model, model.unload()):
        with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError, match="fail_on_recompile"):
            one(**BATCH)


def test_compiled_code_computes_the_same_and_hides_nothing_from_a_profile() -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    torch.compiler.reset()  # of what other tests compiled there is only so much room
    base = tiny_model("olmoe")
    base.model.norm = torch.compile(base.model.norm, backend=backend)
    model = trained(base, SieveLoraConfig(r=4, selected_experts=MASK))
    with torch.no_grad():
        assert torch.allclose(model(**BATCH).logits, logits(model), atol=1e-5)
        assert len(graphs) == 1
        base = tiny_model("olmoe")
        base.model.layers[0].mlp = compiled(base.model.layers[0].mlp)
        base(**BATCH)  # what is compiled now does not see the hooks of the profile
    assert profile_routing(base, [BATCH]) == profile_routing(tiny_model("olmoe"), [BATCH])


def test_the_file_names_the_model_inside(tmp_path: Path) -> None:
    base = small_olmoe()
    name = next(iter(profile_routing(base, [BATCH]).counts))
    model = get_peft_model(compiled(base), SieveLoraConfig(r=4, selected_experts={name: [1]}))
    assert model.peft_config["default"].base_model_name_or_path == base.name_or_path != ""
    model.save_pretrained(tmp_path)
    saved = json.loads(Path(tmp_path, "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == base.name_or_path
    assert saved["auto_mapping"]["base_model_class"] == "OlmoeForCausalLM"


@pytest.mark.parametrize(
    "way", [*COMPILED.values(), checkpointed, nn.DataParallel, lambda m: compiled(checkpointed(m))]
)
def test_a_profile_of_a_wrapped_model(way: Callable[[Any], Any]) -> None:
    expected = profile_routing(tiny_model("olmoe"), [BATCH])
    assert list(expected.counts) == list(MASK)
    model = way(tiny_model("olmoe"))
    assert profile_routing(model, [BATCH]) == expected
    modules = [type(module).__name__ for module in model.modules()]
    assert modules == [type(module).__name__ for module in way(tiny_model("olmoe")).modules()]


def test_a_profile_of_a_compiled_adapter() -> None:
    model = compiled(trained(tiny_model("olmoe"), SieveLoraConfig(r=4, selected_experts=MASK)))
    assert profile_routing(model, [BATCH]) == profile_routing(tiny_model("olmoe"), [BATCH])


def test_a_warm_up_of_a_compiled_model() -> None:
    expected = warm_up_profile(tiny_model("olmoe"), [BATCH], fraction=1.0)
    base = compiled(compiled_layers(tiny_model("olmoe")))
    modules = list(base.modules())
    before = logits(base)
    assert warm_up_profile(base, [BATCH], fraction=1.0) == expected
    assert list(base.modules()) == modules and torch.equal(logits(base), before)


@pytest.mark.parametrize("way", ["model", "layers"])
def test_a_refused_adapter_leaves_the_wrappers(way: str) -> None:
    base = COMPILED[way](tiny_model("olmoe"))
    modules = list(base.modules())
    with pytest.raises(SieveError, match="holds the id 99"):
        get_peft_model(base, SieveLoraConfig(r=4, selected_experts={"model.layers.0.mlp.experts": [99]}))
    assert list(base.modules()) == modules
    assert all(module._compiled_call_impl is None for module in modules)


def test_names_with_wrappers_in_a_configuration() -> None:
    wrapped = {f"_orig_mod.{name}": ids for name, ids in MASK.items()}
    wrapped = {name.replace("layers.0.", "layers.0._checkpoint_wrapped_module."): ids for name, ids in wrapped.items()}
    config = SieveLoraConfig(
        selected_experts=wrapped,
        rank_pattern={"layers.0._orig_mod.self_attn.q_proj": 2, r"model\.layers\.1\._orig_mod\.mlp": 4},
        target_modules=["_orig_mod.model.layers.0.self_attn.q_proj"],
        exclude_modules=r".*\.1\._orig_mod\.self_attn",
    )
    assert config.selected_experts == MASK
    assert config.rank_pattern == {"layers.0.self_attn.q_proj": 2, r"model\.layers\.1\.mlp": 4}
    assert set(config.target_modules) == {"model.layers.0.self_attn.q_proj"}
    assert config.exclude_modules == r".*\.1\.self_attn"
    with pytest.raises(SieveError, match=r"selected_experts names 'model.layers.0.mlp.experts' more than once"):
        SieveLoraConfig(selected_experts={**MASK, **wrapped})


def test_an_adapter_that_was_saved_with_wrappers_in_its_names(tmp_path: Path) -> None:
    model = trained(tiny_model("olmoe"), SieveLoraConfig(r=4, selected_experts=MASK, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    old = {key.replace("base_model.model.", "base_model.model._orig_mod."): value for key, value in weights.items()}
    save_file(old, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    file = Path(tmp_path, "adapter_config.json")
    file.write_text(file.read_text().replace('"model.layers', '"_orig_mod.model.layers'))
    for base in (tiny_model("olmoe"), compiled(tiny_model("olmoe"))):
        assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path).eval()), logits(model))


@pytest.mark.parametrize("way", [compiled_layers, checkpointed])
def test_wrapped_after_the_injection(way: Callable[[Any], Any], tmp_path: Path) -> None:
    """As compilation by regions and FSDP's activation checkpointing do it."""
    config = SieveLoraConfig(r=4, selected_experts=MASK, task_type="CAUSAL_LM")
    model = trained(tiny_model("olmoe"), config)
    model.save_pretrained(tmp_path / "plain")
    way(model.get_base_model())
    model.save_pretrained(tmp_path / "wrapped")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "wrapped")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(value, files[1][key]) for key, value in files[0].items())
    expected = logits(model)
    fill(model, seed=2)
    assert not torch.equal(logits(model), expected)
    model.load_adapter(tmp_path / "wrapped", "default")
    assert torch.equal(logits(model), expected)


def test_wrappers_that_adapters_do_not_fit_into() -> None:
    config = SieveLoraConfig(r=4, selected_experts=MASK)
    with pytest.raises(SieveError, match="is a DataParallel, .*model.module"):
        get_peft_model(nn.DataParallel(tiny_model("olmoe")), config)
    with pytest.raises(SieveError, match="'model.layers.0' is a CheckpointWrapper.*Add the adapter first"):
        get_peft_model(checkpointed(tiny_model("olmoe")), config)

"""Experts that are modules, and experts in pairs of stacks: the whole path on each family, and a naive reference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.func import functional_call
from transformers import CONFIG_MAPPING, AutoBackbone, AutoModelForCausalLM

from peft_sieve import SieveError, SieveLoraConfig, profile_routing
from peft_sieve.moe.attention import attention_linears
from peft_sieve.moe.topology import MoELayer, find_moe_layers
from peft_sieve.tuners.common.experts.layer import SieveExpertLayer
from tests.models import randomize_adapters, token_batch
from tests.module_models import MODELS, jetmoe, switch_transformers
from tests.reference import assert_same
from tests.transformers4_like import Qwen2MoeBlock, transformers4_like
from tests.tuners.test_expert_layer import naive_adapter

# What the weight of one projection of one expert is called in its block, and which of its rows are the projection's.
GATED = {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"}
LINEARS = {
    "deepseek_like": ("experts.{}.", GATED),
    "mixtral_v4": ("experts.{}.", {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}),
    "qwen2_moe_v4": ("experts.{}.", GATED),
    "switch_transformers": ("experts.expert_{}.", {"up_proj": "wi", "down_proj": "wo"}),
    "nllb_moe": ("experts.expert_{}.", {"up_proj": "fc1", "down_proj": "fc2"}),
}


def block_of(model: nn.Module, layer: MoELayer) -> nn.Module:
    return model.get_submodule(layer.path.rpartition(".")[0])


def run(model: nn.Module, batch: dict[str, torch.Tensor]) -> Any:
    """With the inputs as labels, where there is a decoder to read them, moved by one."""
    decoder = {"labels": batch["input_ids"]} if model.config.is_encoder_decoder else {}
    return model(**batch, **decoder)


def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return run(model, batch).logits


def adapted(model: nn.Module, batch: dict[str, torch.Tensor], **options: Any) -> PeftModel:
    return get_peft_model(model, SieveLoraConfig(r=4, lora_dropout=0.0, calib_dataset=[batch], **options))


class Recount:
    """What the experts of each layer really computed, and how much of it went into the output of their block.

    The weight of a row is the derivative of the block's output by the expert's: no router is asked.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = find_moe_layers(model)
        self.counts = {layer.path: torch.zeros(layer.num_experts, dtype=torch.int64) for layer in self.layers}
        self.mass = {layer.path: torch.zeros(layer.num_experts, dtype=torch.float64) for layer in self.layers}
        self.outputs: list[tuple[int, torch.Tensor]] = []
        for layer in self.layers:
            block = block_of(model, layer)
            if layer.path.endswith("input_linear"):
                block.output_linear.register_forward_hook(self._stack)
            else:
                children = layer.experts.children()
                experts = [child for child in children if list(child.parameters())]
                for index, expert in enumerate(experts):
                    expert.register_forward_hook(lambda m, args, out, i=index: self.outputs.append((i, out)))
            done = self._done(layer.path)
            if hasattr(block, "reduce"):
                block.reduce = lambda *args, f=block.reduce, done=done: done(None, None, f(*args))
            else:
                block.register_forward_hook(done)

    def _stack(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        parts = output.split(args[1])
        self.outputs += list(enumerate(parts))
        return torch.cat(parts)

    def _done(self, path: str) -> Callable[..., Any]:
        def hook(module: Any, args: Any, output: Any) -> Any:
            total = (output[0] if isinstance(output, tuple) else output).sum()
            weights = torch.autograd.grad(total, [rows for _, rows in self.outputs], retain_graph=True)
            for (expert, rows), weight in zip(self.outputs, weights, strict=True):
                self.counts[path][expert] += rows.shape[0]
                self.mass[path][expert] += weight[:, 0].double().sum()
            self.outputs.clear()
            return output

        return hook


@pytest.mark.parametrize("name", MODELS)
def test_profile_equals_what_the_experts_computed(name: str) -> None:
    model = MODELS[name]()
    batch = token_batch(model, batch=2, length=16)
    batches = [{**batch, "labels": batch["input_ids"]}]
    profile = profile_routing(model, batches)
    recount = Recount(model)
    run(model, batch)
    for path, counts in recount.counts.items():
        assert counts.sum() > 0
        assert torch.equal(profile.counts[path], counts), path
        assert torch.allclose(profile.mass[path], recount.mass[path], rtol=1e-4), path
    if name == "switch_transformers":  # two sequences of 16 tokens, three of which an expert takes at most
        assert all(counts.max() <= 6 and counts.sum() < 32 for counts in recount.counts.values())
    if name == "nllb_moe":
        assert all(counts[:2].all() and not counts[2:].any() for counts in recount.counts.values())


def test_weights_that_a_block_normalises() -> None:
    model = transformers4_like("qwen2_moe_v4")
    for layer in model.model.layers:
        layer.mlp.norm_topk_prob = True
    batch = token_batch(model)
    profile = profile_routing(model, [batch])
    recount = Recount(model)
    run(model, batch)
    for path, mass in recount.mass.items():
        assert mass.sum() == pytest.approx(3 * 12)
        assert torch.allclose(profile.mass[path], mass, rtol=1e-4)


@pytest.mark.parametrize("name", ["mixtral_v4", "switch_transformers", "nllb_moe", "jetmoe"])
def test_padding_does_not_count(name: str) -> None:
    model = MODELS[name]()
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randint(3, 128, (n,), generator=generator) for n in (5, 9, 14)]
    alone = profile_routing(model, [{"input_ids": ids[None], "labels": ids[None]} for ids in samples])
    # Some models find the padding by its id.
    pad_id = getattr(model.config, "pad_token_id", None) or 0

    def padded(value: int) -> torch.Tensor:
        return nn.utils.rnn.pad_sequence(samples, batch_first=True, padding_value=value)

    ids = padded(pad_id)
    together = {"input_ids": ids, "attention_mask": (padded(-100) != -100).long(), "labels": padded(-100)}
    profile = profile_routing(model, [together])
    for path, counts in alone.counts.items():
        assert torch.equal(profile.counts[path], counts), path
        assert torch.allclose(profile.mass[path], alone.mass[path], rtol=1e-3), path


def received(model: nn.Module, layer: MoELayer) -> torch.Tensor:
    """Rows of each expert from now on."""
    rows = torch.zeros(layer.num_experts, dtype=torch.int64)
    if layer.path.endswith("input_linear"):

        def stack_called(m: nn.Module, args: Any) -> None:
            rows.add_(torch.tensor(args[1]))

        block_of(model, layer).output_linear.register_forward_pre_hook(stack_called)
        return rows
    experts = [child for child in layer.experts.children() if list(child.parameters())]
    for index, expert in enumerate(experts):

        def hook(m: nn.Module, args: Any, index: int = index) -> None:
            rows[index] += args[0].shape[0]

        expert.register_forward_pre_hook(hook)
    return rows


@pytest.mark.parametrize("name", MODELS)
def test_train_save_load_merge(name: str, tmp_path: Path) -> None:
    make = MODELS[name]
    model = make()
    batch, small = token_batch(model), token_batch(model, batch=1, length=2, seed=1)
    before = logits(model, batch)
    layers = find_moe_layers(model)
    calibrated = adapted(model, batch)
    mask = calibrated.peft_config["default"].selected_experts
    assert {path: len(ids) for path, ids in mask.items()} == {layer.path: 2 for layer in layers}
    assert torch.equal(logits(calibrated, batch), before)  # B is zero
    model = calibrated.unload()

    # An expert of the last token to train on, and one that gets none. Not the first one's: where experts make queries,
    # those of a token that attends to itself alone learn nothing.
    counts, first = (profile_routing(model, [{k: v[:, :n] for k, v in small.items()}]).counts for n in (2, 1))
    mask = {
        path: sorted([int((count - first[path]).argmax()), int((count == 0).nonzero()[0])])
        for path, count in counts.items()
    }
    layers = find_moe_layers(model)
    peft_model = get_peft_model(model, SieveLoraConfig(r=4, lora_dropout=0.0, selected_experts=mask))
    randomize_adapters(peft_model, std=0.01)  # tokens go where they went without them
    rows = {layer.path: received(model, layer) for layer in layers}
    peft_model.train()
    run(peft_model, small).logits.square().sum().backward()
    for parameter_name, parameter in peft_model.named_parameters():
        assert parameter.requires_grad == ("lora_" in parameter_name), parameter_name
        assert parameter.requires_grad or parameter.grad is None, parameter_name
    adapters = {module.path: module for module in peft_model.modules() if isinstance(module, SieveExpertLayer)}
    assert adapters.keys() == mask.keys()
    for path, adapter in adapters.items():
        for held in ("lora_gate_up_A", "lora_gate_up_B", "lora_down_A", "lora_down_B"):
            gradient = getattr(adapter, held)["default"].weight.grad
            learned = [bool(gradient[slot].abs().max() > 0) for slot in range(2)]
            assert learned == [bool(rows[path][expert]) for expert in mask[path]], (path, held)
            assert sorted(learned) == [False, True], (path, held)

    randomize_adapters(peft_model)
    peft_model.eval()
    trained = logits(peft_model, batch)
    assert not torch.allclose(trained, before)
    peft_model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(), tmp_path)
    assert torch.equal(logits(loaded, batch), trained)
    weights = {n: p.clone() for n, p in loaded.named_parameters()}
    loaded.merge_adapter()
    assert (logits(loaded, batch) - trained).abs().max() < 1e-4 * trained.abs().max()
    loaded.unmerge_adapter()
    assert all(torch.equal(p, weights[n]) for n, p in loaded.named_parameters())
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded, batch), before)
    assert torch.equal(logits(loaded, batch), trained)
    base = loaded.unload()
    assert torch.equal(logits(base, batch), before)
    assert not any(isinstance(module, SieveExpertLayer) for module in base.modules())
    assert {n: p.shape for n, p in base.named_parameters()} == {n: p.shape for n, p in make().named_parameters()}


class Attention(nn.Module):
    """jetmoe's attention experts, which have no forward: something between the two projections."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        queries, _, topology = self.experts.map(x)
        return self.experts.reduce(queries.tanh(), topology)


def merged_weights(
    name: str, layer: SieveExpertLayer, block: nn.Module, adapters: list[str], prefix: str
) -> dict[str, torch.Tensor]:
    """The block's weights with `scaling * B^T A` added, differentiable in the factors."""
    weights = {key: value.detach().clone() for key, value in block.named_parameters() if "lora_" not in key}
    weights = {key.replace(".base_layer", ""): value for key, value in weights.items()}
    for adapter in adapters:
        for (projection, expert), factors in naive_adapter(layer, adapter).items():
            delta = factors.scaling * factors.b.T @ factors.a
            if name in LINEARS:
                path, names = LINEARS[name]
                key = prefix + path.format(expert) + names[projection] + ".weight"
                weights[key] = weights[key] + delta
                continue
            key = prefix + ("output" if projection == "down_proj" else "input") + "_linear.weight"
            rows = {"gate_proj": slice(24), "up_proj": slice(-len(delta), None), "down_proj": slice(None)}[projection]
            stack = weights[key].clone()
            stack[expert, rows] += delta
            weights[key] = stack
    return weights


# Of the first adapter and of the second.
SHARING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "": ({}, {}),
    "cold": ({"cold_experts": "shared"}, {"share_outer": True}),
    "both": ({"cold_experts": "shared", "share_outer": True}, {"cold_experts": "shared"}),
}


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("name", [*MODELS, "jetmoe attention"])
def test_outputs_and_gradients_equal_merged_weights(name: str, sharing: str) -> None:
    """Two adapters at once, on other experts and other projections, against explicit weights without any hook."""
    model = MODELS[name.split()[0]]().double()
    layers = find_moe_layers(model)
    layer = layers[1] if name == "jetmoe attention" else layers[0]
    block = block_of(model, layer)
    for module in block.modules():
        if hasattr(module, "dtype"):
            module.dtype = torch.float64  # in which switch_transformers and nllb_moe route
    plain = copy.deepcopy(block)
    first, second = SHARING[sharing]
    config = SieveLoraConfig(r=4, lora_dropout=0.0, selected_experts={layer.path: [0, 1, 2, 6]}, **first)
    peft_model = get_peft_model(model, config)
    some = ["gate_proj", "down_proj"] if "gate_proj" in layer.shape.projections else ["up_proj"]
    other = {"selected_experts": {layer.path: [1, 3]}, "expert_projections": some}
    peft_model.add_adapter("other", SieveLoraConfig(r=3, lora_dropout=0.0, **other, **second))
    peft_model.base_model.set_adapter(["default", "other"])
    randomize_adapters(peft_model, std=0.3)
    for parameter_name, parameter in peft_model.named_parameters():
        if "lora_" in parameter_name and ".lora_gate_up_" not in parameter_name and ".lora_down_" not in parameter_name:
            parameter.data.zero_()  # adapters of the router: not the question here
    (adapter,) = (module for module in peft_model.modules() if isinstance(module, SieveExpertLayer))
    if name == "jetmoe attention":
        block, plain = Attention(block), Attention(plain)
    prefix = "experts." if name == "jetmoe attention" else ""

    def outcome(call: Callable[[torch.Tensor], Any]) -> dict[str, torch.Tensor]:
        x = torch.randn(2, 20, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        leaves = {n: p for n, p in adapter.named_parameters() if "lora_" in n}
        output = call(x)
        output = output[0] if isinstance(output, tuple) else output
        found = torch.autograd.grad(output.square().sum(), [x, *leaves.values()])
        return {"output": output.detach(), **dict(zip(["x", *leaves], found, strict=True))}

    fast = outcome(block.train())
    keys = set(dict(plain.named_parameters()))
    weights = merged_weights(name.split()[0], adapter, block, ["default", "other"], prefix)
    naive = outcome(lambda x: functional_call(plain.train(), {k: v for k, v in weights.items() if k in keys}, (x,)))
    assert len(fast) == 2 + (8 if len(some) > 1 else 6)
    for what, value in naive.items():
        assert_same(fast[what], value, what)


def test_a_copy_of_jetmoe_has_blocks_of_its_own() -> None:
    model = jetmoe()
    batch = token_batch(model)
    peft_model = adapted(model, batch)
    randomize_adapters(peft_model)
    expected = logits(peft_model, batch)
    other = copy.deepcopy(peft_model)
    other.merge_adapter()
    assert torch.equal(logits(peft_model, batch), expected)
    assert (logits(other, batch) - expected).abs().max() < 1e-4 * expected.abs().max()
    for parameter in other.parameters():
        parameter.data.zero_()
    assert torch.equal(logits(peft_model, batch), expected)


def test_attention_experts_and_their_router_are_not_attention() -> None:
    model = jetmoe()
    batch = token_batch(model)
    layers = find_moe_layers(model)
    assert attention_linears(model, layers) == [f"model.layers.{i}.self_attention.kv_proj" for i in range(2)]
    names = set(adapted(model, batch, train_router=False).base_model.targeted_module_names)
    assert names == set(attention_linears(model, layers))
    names = set(adapted(jetmoe(), batch, train_attention=False).base_model.targeted_module_names)
    assert names == {router.path for layer in layers for router in layer.routers}
    assert len(names) == 4


def test_a_second_adapter_reaches_the_router_of_jetmoe() -> None:
    model = jetmoe()
    batch = token_batch(model)
    peft_model = adapted(model, batch)
    peft_model.add_adapter("other", SieveLoraConfig(r=4, calib_dataset=[batch]))
    for layer in find_moe_layers(model):
        router = model.get_submodule(layer.routers[0].path)
        assert set(router.lora_A) == {"default", "other"}


def test_attention_of_an_encoder_decoder() -> None:
    model = switch_transformers()
    found = attention_linears(model, find_moe_layers(model))
    assert len(found) == 4 * (2 + 2 + 2)  # encoder, decoder, and what lies between them
    assert sum("EncDecAttention" in path for path in found) == 8


def test_what_is_taken_for_experts() -> None:
    """Two MLPs or more beside a router; not with other weights among them, and no transformer blocks."""

    def mlp(**more: nn.Module) -> nn.Module:
        return nn.ModuleDict({"fc1": nn.Linear(4, 4), "fc2": nn.Linear(4, 4), **more})

    model = transformers4_like("mixtral_v4")
    expected = {layer.path for layer in find_moe_layers(model)}
    layer = model.model.layers[0]
    layer.pair = nn.ModuleList([mlp(), mlp()])
    layer.single = nn.ModuleList([mlp()])
    layer.mixed = nn.ModuleList([mlp(), mlp(), nn.Linear(4, 4)])
    layer.blocks = nn.ModuleList([mlp(attention=nn.Linear(4, 4)), mlp(attention=nn.Linear(4, 4))])
    assert {found.path for found in find_moe_layers(model)} == expected
    layer.router = nn.Linear(4, 2)
    assert {found.path for found in find_moe_layers(model)} == expected | {"model.layers.0.pair"}


def test_rows_that_are_no_tokens() -> None:
    model = transformers4_like("qwen2_moe_v4")
    for expert in model.model.layers[1].mlp.experts:
        expert.register_forward_pre_hook(lambda m, args: (args[0] * 2,), prepend=True)
    with pytest.raises(SieveError, match=r"Qwen2MoeBlock .*rows that its router did not read.*watch\(\)"):
        profile_routing(model, [token_batch(model)])


def test_a_router_that_keeps_its_weights_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(nn.Linear):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": super().forward(x)}

    monkeypatch.setattr(Qwen2MoeBlock, "forward", forward_of_a_mapping)
    model = transformers4_like("qwen2_moe_v4")
    for layer in model.model.layers:
        layer.mlp.gate.__class__ = Silent
    with pytest.warns(UserWarning, match="neither expert weights nor logits: the profile's mass counts"):
        profile = profile_routing(model, [token_batch(model)])
    for path, counts in profile.counts.items():
        assert counts.sum() == 3 * 12 * 3
        assert torch.equal(profile.mass[path], counts.double())


def forward_of_a_mapping(block: nn.Module, hidden_states: torch.Tensor) -> tuple[torch.Tensor, None]:
    flat = hidden_states.flatten(0, 1)
    weights, selected = block.gate(flat)["logits"].softmax(-1).topk(block.top_k)
    out = torch.zeros_like(flat)
    for index, expert in enumerate(block.experts):
        tokens, slots = torch.where(selected == index)
        out.index_add_(0, tokens, expert(flat[tokens]) * weights[tokens, slots, None])
    return out.view_as(hidden_states), None


@pytest.mark.parametrize(
    ("auto", "name", "settings", "reason"),
    [
        (
            AutoModelForCausalLM,
            "doge",
            {
                "vocab_size": 64,
                "intermediate_size": 24,
                "num_key_value_heads": 2,
                "is_moe": True,
                "num_experts": 16,
                "num_experts_per_tok": 2,
            },
            "single rows of two embeddings.*trainable_token_indices",
        ),
        (
            AutoBackbone,
            "vitpose_backbone",
            {"image_size": [32, 32], "patch_size": [16, 16], "num_experts": 2, "part_features": 8, "mlp_ratio": 2},
            "chosen by the caller.*no routing",
        ),
    ],
)
def test_what_cannot_be_adapted_says_why(auto: Any, name: str, settings: dict[str, Any], reason: str) -> None:
    common = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = auto.from_config(CONFIG_MAPPING[name](**common, **settings))
    modules = list(model.modules())
    with pytest.raises(SieveError, match=reason):
        get_peft_model(model, SieveLoraConfig(selected_experts={"layers.0.mlp": [1]}))
    assert list(model.modules()) == modules

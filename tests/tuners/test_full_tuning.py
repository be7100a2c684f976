"""`expert_tuning="full"`: the selected experts' own weights, trained as differences of full size."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from safetensors import safe_open
from torch import nn
from transformers import TorchAoConfig
from trl import SFTConfig, SFTTrainer

from peft_sieve import SieveError, SieveLoraConfig, export_lora, inspect_adapter, merge_checkpoint
from peft_sieve.kernels.backend import BACKEND_VARIABLE
from peft_sieve.moe.topology import find_moe_layers
from peft_sieve.tuners.common.experts.layer import expert_layers
from tests.deepseek_like import deepseek_like
from tests.habits.test_quantised import check_against_reference, load, with_stacks
from tests.models import randomize_adapters, small_olmoe, small_tokenizer, tiny_model, token_batch
from tests.reference import assert_same, naive_experts, naive_weight
from tests.training.runs import settings
from tests.tuners.test_expert_layer import dispatch, gradients, make_layer

FLAGS = ("has_gate", "is_transposed", "is_concatenated")


def config(model: nn.Module, experts: tuple[int, ...] = (1, 4, 6), **options: Any) -> SieveLoraConfig:
    mask = {layer.path: list(experts) for layer in find_moe_layers(model)}
    fixed = {"selected_experts": mask, "train_attention": False, "train_router": False, "train_shared_experts": False}
    return SieveLoraConfig(**{**fixed, "expert_tuning": "full", "task_type": "CAUSAL_LM", **options})


def adapted(model: nn.Module, std: float = 0.1, **options: Any) -> PeftModel:
    """With differences that are not zero, in evaluation mode."""
    peft_model = get_peft_model(model, config(model, **options), autocast_adapter_dtype=False)
    randomize_adapters(peft_model, std)
    return peft_model.eval()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


CASES = [
    ("olmoe", "grouped_mm", {}),
    ("olmoe", "eager", {}),
    ("gpt_oss", "grouped_mm", {}),
    ("nemotron_h", "grouped_mm", {}),
    ("olmoe", "grouped_mm", {"expert_projections": ["up_proj"]}),
]


@pytest.mark.parametrize(("name", "implementation", "options"), CASES)
def test_it_computes_and_learns_as_if_the_weights_were_changed(
    name: str, implementation: str, options: dict[str, Any]
) -> None:
    """Against an expert at a time on a copy of the stacks whose slices are the sums, and the gradients of those."""
    model = tiny_model(name, torch.float64)
    model.set_experts_implementation(implementation)
    plain = copy.deepcopy(find_moe_layers(model)[0].experts)
    layer = expert_layers(adapted(model, **options))[0][1]
    projections = list(layer.plans["default"].ranks)
    changed = [(p, e, slot) for p in projections for slot, e in enumerate((1, 4, 6))]
    with torch.no_grad():
        for projection, expert, slot in changed:
            delta, scaling = layer.full_delta("default", projection)
            assert scaling == 1.0
            naive_weight(plain, projection, expert).add_(delta[slot])
    for parameter in plain.parameters():
        parameter.requires_grad_()

    generator = torch.Generator().manual_seed(2)
    inputs = [torch.randn(20, 32, generator=generator).double(), torch.rand(20, 2, generator=generator).double()]
    ids = torch.stack([torch.randperm(8, generator=generator)[:2] for _ in range(20)])
    ours, theirs = ([tensor.clone().requires_grad_() for tensor in inputs] for _ in range(2))
    actual = layer(ours[0], ids, ours[1])
    expected = naive_experts(plain, theirs[0], ids, theirs[1], [])
    assert_same(actual.detach(), expected.detach(), "output")
    probe = torch.randn(actual.shape, dtype=torch.float64, generator=generator)
    (actual * probe).sum().backward()
    (expected * probe).sum().backward()
    assert_same(ours[0].grad, theirs[0].grad, "gradient of the hidden states")
    assert_same(ours[1].grad, theirs[1].grad, "gradient of the weights of experts")
    expected_gradients = SimpleNamespace(
        **{n: getattr(plain, n) for n in FLAGS}, **{n: p.grad for n, p in plain.named_parameters()}
    )
    packed = {}
    for group in ("lora_gate_up_delta", "lora_down_delta"):
        modules = getattr(layer, group)
        if "default" in modules:
            packed[group] = modules["default"].weight.grad
    for projection, expert, slot in changed:
        group, rows = layer._packed("default", projection)
        assert_same(
            packed[f"{group}_delta"][slot, rows],
            naive_weight(expected_gradients, projection, expert),
            f"{projection} {expert}",
        )
    assert all(parameter.grad is None for parameter in layer.get_base_layer().parameters())


@pytest.mark.parametrize("layout", ["olmoe", "gpt_oss"])
def test_the_kernels_of_a_gpu_compute_the_same(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, Triton's interpreter runs them."""
    pytest.importorskip("triton")
    found = {}
    for backend in ("loop", "device"):
        monkeypatch.setenv(BACKEND_VARIABLE, backend)
        layer = make_layer(layout, dtype=torch.float32, expert_tuning="full")
        hidden, ids, expert_weights = dispatch(torch.float32)
        out = layer(hidden, ids, expert_weights)
        probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
        (out * probe).sum().backward()
        found[backend] = {"output": out.detach(), **gradients(layer, hidden, expert_weights)}
    assert len(found["loop"]) == 5
    for name, value in found["loop"].items():
        assert_same(found["device"][name], value, name, rtol=1e-4, atol=1e-5)


def test_training_it_is_training_the_slices() -> None:
    """Three steps of SGD, against the stacks themselves trained with the gradients of other experts set to zero."""
    model = tiny_model("olmoe", torch.float64)
    model.set_experts_implementation("eager")
    reference = copy.deepcopy(model)
    batch = token_batch(model) | {"labels": token_batch(model)["input_ids"]}
    peft_model = get_peft_model(model, config(model), autocast_adapter_dtype=False)
    optimizer = torch.optim.SGD([p for p in peft_model.parameters() if p.requires_grad], lr=0.5)
    stacks = [p for layer in find_moe_layers(reference) for p in layer.experts.parameters()]
    plain_optimizer = torch.optim.SGD(stacks, lr=0.5)
    others = [expert for expert in range(8) if expert not in (1, 4, 6)]
    losses = []
    for _ in range(3):
        for trained, chosen in ((peft_model, optimizer), (reference, plain_optimizer)):
            loss = trained(**batch).loss
            chosen.zero_grad()
            loss.backward()
            for parameter in stacks:
                if parameter.grad is not None:
                    parameter.grad[others] = 0
            chosen.step()
            losses.append(loss.item())
    assert losses[-2] < losses[0] - 0.01
    merged = peft_model.merge_and_unload().state_dict()
    for name, value in reference.state_dict().items():
        assert torch.allclose(merged[name], value, rtol=1e-9, atol=1e-12), name


def test_only_the_selected_slices_have_parameters_gradients_and_states(tmp_path: Path) -> None:
    model = tiny_model("olmoe", torch.bfloat16)
    peft_model = get_peft_model(model, config(model, experts=(2, 5)))
    trainable = {n: p for n, p in peft_model.named_parameters() if p.requires_grad}
    shapes = {"lora_gate_up_delta": (2, 48, 32), "lora_down_delta": (2, 32, 24)}
    assert {n.split(".")[-3]: tuple(p.shape) for n, p in trainable.items()} == shapes
    assert len(trainable) == 4
    # Small steps are not lost in the base's half precision.
    assert all(p.dtype == torch.float32 for p in trainable.values())
    optimizer = torch.optim.AdamW(trainable.values())
    peft_model(**token_batch(model), labels=token_batch(model)["input_ids"]).loss.backward()
    optimizer.step()
    slices = 2 * 2 * 3 * 24 * 32  # layers, experts, projections
    assert sum(p.numel() for p in trainable.values()) == slices
    assert sum(p.grad.numel() for p in peft_model.parameters() if p.grad is not None) == slices
    assert sum(state["exp_avg"].numel() for state in optimizer.state.values()) == slices

    peft_model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        saved = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    prefix = "base_model.model.model.layers.0.mlp.experts"
    assert saved[f"{prefix}.lora_gate_up_delta.weight"] == [2, 48, 32]
    assert saved[f"{prefix}.lora_down_delta.weight"] == [2, 32, 24]
    assert "Full tuning for" in (tmp_path / "README.md").read_text()
    assert saved[f"{prefix}.lora_experts.slots"] == [8] and len(saved) == 6
    summary = inspect_adapter(str(tmp_path))
    assert sum(layer.num_parameters for layer in summary.layers) == slices
    assert not summary.modules


@pytest.mark.parametrize("make", [lambda: tiny_model("olmoe"), lambda: tiny_model("gpt_oss"), deepseek_like])
def test_the_base_is_never_lost(make: Any) -> None:
    model = make()
    base, batch = weights(model), token_batch(model)
    before = logits(model, batch)
    peft_model = get_peft_model(model, config(model)).eval()
    assert torch.equal(logits(peft_model, batch), before), "a new adapter changes nothing"
    randomize_adapters(peft_model, 0.05)
    changed = logits(peft_model, batch)
    assert (changed - before).abs().max() > 1e-3
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model, batch), before)
    peft_model.merge_adapter()
    assert torch.allclose(logits(peft_model, batch), changed, atol=1e-4)
    peft_model.unmerge_adapter()
    assert torch.equal(logits(peft_model, batch), changed)
    unloaded = peft_model.unload()
    assert torch.equal(logits(unloaded, batch), before)
    for name, value in base.items():
        assert torch.equal(unloaded.state_dict()[name], value), name


def test_stacks_in_fewer_bits_take_it_and_refuse_to_be_merged(tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    tiny_model("qwen2_moe", hidden_size=64, num_key_value_heads=4, head_dim=16).save_pretrained(tmp_path / "base")
    stacks = torchao.FqnToConfig({r"re:.*\.experts\.(gate_up|down)_proj": torchao.Int8WeightOnlyConfig(version=2)})

    def quantised() -> Any:
        method = TorchAoConfig(stacks)
        return load(tmp_path / "base", quantization_config=method, experts_implementation="eager").eval()

    model = quantised()
    stock = load(tmp_path / "base", experts_implementation="eager").eval()
    reference = with_stacks(stock, lambda experts, name: getattr(experts, name).dequantize(), model)
    batch = token_batch(model)
    check_against_reference(model, reference, batch, tmp_path / "adapter", quantised, expert_tuning="full")


def test_merging_a_checkpoint_gives_the_weights(tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    model.save_pretrained(tmp_path / "base")
    peft_model = adapted(model)
    peft_model.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(str(tmp_path / "adapter"), str(tmp_path / "base"), str(tmp_path / "merged"))
    merged = type(model).from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    batch = token_batch(model)
    assert torch.allclose(logits(merged, batch), logits(peft_model, batch), atol=1e-4)


def test_it_goes_together_with_other_adapters(tmp_path: Path) -> None:
    """Beside LoRA on attention, at once with a LoRA adapter, and each row of a batch with its own."""
    model = tiny_model("olmoe")
    batch = token_batch(model)
    peft_model = adapted(model, 0.05, train_attention=True, train_router=True, r=4)
    peft_model.add_adapter("lora", config(model, experts=(0, 4), expert_tuning="lora", r=4))
    randomize_adapters(peft_model, 0.05, seed=3)
    peft_model.eval()
    alone = {}
    for name in ("default", "lora"):
        peft_model.set_adapter(name)
        alone[name] = logits(peft_model, batch)
    names = ["default", "lora", "__base__"]
    with torch.no_grad():
        mixed = peft_model(**batch, adapter_names=names).logits
    with peft_model.disable_adapter():
        alone["__base__"] = logits(peft_model, batch)
    for row, name in enumerate(names):
        assert torch.allclose(mixed[row], alone[name][row], atol=1e-4), name
    peft_model.base_model.set_adapter(["default", "lora"])
    both = logits(peft_model, batch)
    assert (both - alone["lora"]).abs().max() > 1e-3
    assert torch.allclose(logits(peft_model.merge_and_unload(), batch), both, atol=1e-4)


def test_sft_training_saves_loads_and_resumes(tmp_path: Path) -> None:
    texts = Dataset.from_list([{"text": f"The {n} sheep sleep on hill number {n * n}."} for n in range(16)])

    def trainer(**changes: Any) -> SFTTrainer:
        model = small_olmoe()
        fixed = settings(tmp_path / "run", max_steps=4, max_length=24, save_strategy="steps", save_steps=2)
        fixed |= {"bf16": False, "learning_rate": 1e-3}
        options = {"calib_dataset": texts, "score": "esft_token", "strategy": "cumulative", "calib_samples": 8}
        return SFTTrainer(
            model=model,
            args=SFTConfig(**{**fixed, **changes}),
            train_dataset=texts,
            processing_class=small_tokenizer(),
            peft_config=config(model, **{**options, "selected_experts": None}),
        )

    whole = trainer()
    base = weights(whole.model.get_base_model())
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    for name, value in whole.model.get_base_model().state_dict().items():
        if "lora_" not in name:
            assert torch.equal(value, base[name]), name
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    trained = {n: p for n, p in whole.model.named_parameters() if p.requires_grad}
    for name, parameter in resumed.model.named_parameters():
        if name in trained:
            assert torch.equal(parameter, trained[name]), name

    whole.model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(small_olmoe(), tmp_path / "adapter").eval()
    batch = token_batch(loaded.get_base_model(), batch=1, length=8)
    assert torch.equal(logits(loaded, batch), logits(whole.model.eval(), batch))


def test_what_it_cannot_be_is_refused(tmp_path: Path) -> None:
    peft_model = adapted(tiny_model("olmoe"))
    peft_model.save_pretrained(tmp_path / "full")
    for call, message in (
        (lambda: export_lora(peft_model, tmp_path / "lora"), "expert_tuning='full'"),
        (lambda: peft_model.add_weighted_adapter(["default"], [1.0], "sum"), "'default'.*expert_tuning='full'"),
        (lambda: hotswap_adapter(peft_model, str(tmp_path / "full"), "default"), "expert_tuning"),
    ):
        with pytest.raises(SieveError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "lora").exists()
    lora = get_peft_model(tiny_model("olmoe"), config(tiny_model("olmoe"), expert_tuning="lora", r=4))
    lora.save_pretrained(tmp_path / "low_rank")
    with pytest.raises(SieveError, match="lora_gate_up_delta.*'default'"):
        peft_model.load_adapter(str(tmp_path / "low_rank"), "default")

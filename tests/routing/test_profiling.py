"""Profiling: what counts, what does not, and that the model is left as it was."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import get_peft_model
from torch import nn

from peft_sieve import RoutingProfile, SieveError, SieveLoraConfig, profile_routing
from peft_sieve.moe.families.fused import FusedExperts
from peft_sieve.moe.topology import find_moe_layers
from peft_sieve.routing.counting import DispatchCounter
from tests.deepseek_like import deepseek_like
from tests.models import randomize_adapters, small_olmoe, small_tokenizer, tiny_model, token_batch

TEXTS = [f"Question: A farmer has {n} cows and buys {'many more ' * (n % 4)}sheep. How many?" for n in range(14)]


def padded(ids: list[list[int]], side: str) -> dict[str, torch.Tensor]:
    width = max(map(len, ids))
    batch = {"input_ids": torch.zeros(len(ids), width, dtype=torch.int64)}
    batch["attention_mask"] = torch.zeros_like(batch["input_ids"])
    for row, tokens in enumerate(ids):
        place = slice(0, len(tokens)) if side == "right" else slice(width - len(tokens), width)
        batch["input_ids"][row, place] = torch.tensor(tokens)
        batch["attention_mask"][row, place] = 1
    return batch


def same(a: RoutingProfile, b: RoutingProfile, mass: float = 1e-4) -> None:
    assert a.num_tokens == b.num_tokens
    for path in a.counts:
        assert torch.equal(a.counts[path], b.counts[path]), path
        assert torch.allclose(a.mass[path], b.mass[path], rtol=mass), path


@pytest.mark.parametrize("make", [lambda: tiny_model("olmoe"), lambda: tiny_model("gpt_oss"), deepseek_like])
def test_padding_does_not_count_on_either_side(make: Any) -> None:
    model = make()
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 128, (n,), generator=generator).tolist() for n in (5, 9, 14)]
    one_by_one = [{"input_ids": torch.tensor([tokens])} for tokens in ids]
    expected = profile_routing(model, one_by_one)
    assert expected.num_tokens == 28
    assert expected.num_experts_per_tok == {"DeepseekLikeForCausalLM": 3, "OlmoeForCausalLM": 3}.get(
        type(model).__name__, 2
    )
    for path, counts in expected.counts.items():
        assert counts.sum() == 28 * expected.num_experts_per_tok, path
    same(profile_routing(model, [padded(ids, "right")]), expected)
    same(profile_routing(model, [padded(ids, "left")]), expected)


def test_batch_sizes_agree() -> None:
    model, tokenizer = small_olmoe(), small_tokenizer()
    profiles = [profile_routing(model, TEXTS, tokenizer=tokenizer, batch_size=size) for size in (1, 3, 14)]
    assert profiles[0].num_tokens == sum(len(ids) for ids in tokenizer(TEXTS)["input_ids"])
    same(profiles[1], profiles[0])
    same(profiles[2], profiles[0])


def test_the_tokenizer_comes_from_the_model() -> None:
    model = small_olmoe()
    same(profile_routing(model, TEXTS[:3]), profile_routing(model, TEXTS[:3], tokenizer=small_tokenizer()))
    same(profile_routing(model, TEXTS[:3]), profile_routing(model, TEXTS[:3], tokenizer=model.name_or_path))
    with pytest.raises(SieveError, match="tokenizer 'no/such' cannot be loaded"):
        profile_routing(model, TEXTS[:3], tokenizer="no/such")


def test_dropped_slots_do_not_count() -> None:
    """Under expert parallelism a slot that belongs to another process has the id num_experts."""
    model = tiny_model("olmoe")
    experts = find_moe_layers(model)[0].experts
    counter = DispatchCounter(8)
    (handle,) = FusedExperts().watch(experts, model.model.layers[0].mlp, counter.add)
    ids = torch.tensor([[0, 8], [8, 8], [3, 0]])
    weights = torch.tensor([[0.5, 0.0], [0.0, 0.0], [0.25, 0.75]])
    try:
        experts._is_expert_parallel = True
        experts(torch.randn(3, 32), ids, weights)
    finally:
        handle.remove()
    counts, mass = counter.totals()
    assert counts.tolist() == [2, 0, 0, 1, 0, 0, 0, 0]
    assert mass.tolist() == [1.25, 0, 0, 0.25, 0, 0, 0, 0]


def test_the_backbone_runs_without_head_gradients_or_cache() -> None:
    model = tiny_model("olmoe")
    seen: list[dict[str, Any]] = []

    def refuse(*args: Any) -> None:
        raise AssertionError("the head ran")

    def look(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append({"grad": torch.is_grad_enabled(), "training": module.training, **kwargs})

    head = model.lm_head.register_forward_pre_hook(refuse)
    layer = model.model.layers[0].register_forward_pre_hook(look, with_kwargs=True)
    profile_routing(model, [token_batch(model)])
    head.remove()
    layer.remove()
    (call,) = seen
    assert call["grad"] is False
    assert call["training"] is False
    assert call.get("past_key_values") is None


@pytest.mark.parametrize("failure", [None, RuntimeError, KeyboardInterrupt])
def test_everything_is_as_before(failure: type[BaseException] | None) -> None:
    """Hooks, modes module by module, adapters and random states, also after an exception or Ctrl-C."""
    model = tiny_model("olmoe")
    peft_model = get_peft_model(model, SieveLoraConfig(r=4, calib_dataset=[token_batch(model)], task_type="CAUSAL_LM"))
    peft_model.train()
    model.model.layers[1].eval()
    requires_grad = [p.requires_grad for p in peft_model.parameters()]
    modes = [m.training for m in model.modules()]
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    states = torch.get_rng_state(), random.getstate()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    batches = [token_batch(model), token_batch(model, seed=1)]
    if failure is None:
        profile_routing(peft_model, batches)
    else:

        def fail(*args: Any) -> None:
            torch.rand(1)  # as a layer with noise would
            random.random()
            raise failure

        handle = model.model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(failure):
            profile_routing(peft_model, batches)
        handle.remove()
    assert [m.training for m in model.modules()] == modes
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()] == hooks
    assert [p.requires_grad for p in peft_model.parameters()] == requires_grad
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert not any(getattr(m, "_disable_adapters", False) for m in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_adapters_are_off_meanwhile() -> None:
    model = tiny_model("olmoe")
    batch = token_batch(model)
    expected = profile_routing(model, [batch])
    peft_model = get_peft_model(model, SieveLoraConfig(r=4, calib_dataset=[batch], task_type="CAUSAL_LM"))
    randomize_adapters(peft_model, std=1.0)
    same(profile_routing(peft_model, [batch]), expected)
    peft_model.merge_adapter()
    with pytest.raises(SieveError, match="merged adapter.*unmerge_adapter"):
        profile_routing(peft_model, [batch])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types(dtype: torch.dtype) -> None:
    model = tiny_model("olmoe", dtype=dtype)
    if dtype == torch.float64:
        model.config._experts_implementation = "eager"  # the fused kernel of the stock forward takes no float64
    profile = profile_routing(model, [token_batch(model)])
    assert all(counts.sum() == 3 * 12 * 3 for counts in profile.counts.values())
    assert all(mass.dtype == torch.float64 for mass in profile.mass.values())


@pytest.mark.parametrize("kind", ["cpu_offload", "disk_offload", "device_map"])
def test_offloaded_models(kind: str, tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    batch = token_batch(model)
    expected = profile_routing(model, [batch])
    if kind == "cpu_offload":
        cpu_offload(model, torch.device("cpu"))
    elif kind == "disk_offload":
        disk_offload(model, tmp_path, torch.device("cpu"))
    else:
        names = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
        names |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
        dispatch_model(model, names, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    if kind != "device_map":
        assert next(model.parameters()).is_meta
    same(profile_routing(model, [batch]), expected)


class _Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_with_tokens_per_second_for_a_person(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("olmoe")
    for screen, progress, shown in ((_Screen(), True, True), (_Screen(), False, False), (io.StringIO(), True, False)):
        monkeypatch.setattr("sys.stderr", screen)
        profile_routing(model, [token_batch(model)], progress=progress)
        monkeypatch.undo()
        assert ("tok/s" in screen.getvalue()) == shown
        assert ("36" in screen.getvalue()) == shown  # 3 x 12 tokens


def test_data_that_reaches_no_layer() -> None:
    class Detour(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_model("olmoe")

        def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            return self.inner.model.embed_tokens(input_ids)

    model = Detour()
    with pytest.raises(SieveError, match="reached none of the 2 MoE layers"):
        profile_routing(model, [token_batch(model.inner)])


def test_where_a_model_drops_tokens_rows_are_profiled_one_by_one() -> None:
    """Padding cannot be told from tokens there; what other layers have counted by then does not count twice."""
    model = tiny_model("olmoe")
    block = model.model.layers[1].mlp
    block.register_forward_pre_hook(lambda module, args: (args[0][:, 1:].contiguous(),))
    block.register_forward_hook(lambda module, args, out: torch.cat((out[:, :1], out), 1))
    ids = [[5, 6, 7], [8, 9], [4, 5, 6, 7]]
    expected = profile_routing(model, [{"input_ids": torch.tensor([row])} for row in ids])
    first, second = expected.counts.values()
    assert (first.sum(), second.sum()) == (9 * 3, 6 * 3)
    for side in ("left", "right"):
        profile = profile_routing(model, [padded(ids[:1] * 2, side), padded(ids, side)])
        same(profile, profile_routing(model, [{"input_ids": torch.tensor([row])} for row in ids[:1] * 2 + ids]))
        assert profile.num_samples == 5
        for path, share in profile_routing(model, [padded(ids, side)]).sample_share.items():
            assert torch.allclose(share, expected.sample_share[path]), path


def test_where_a_model_drops_tokens_and_rows_cannot_be_cut_apart() -> None:
    model = tiny_model("olmoe")
    model.model.layers[1].mlp.register_forward_pre_hook(lambda module, args: (args[0][:, 1:].contiguous(),))
    batch = {**padded([[5, 6, 7], [8, 9]], "right"), "pixel_values": torch.rand(5, 4)}
    with pytest.raises(SieveError, match="6 tokens with padding reached an experts module as 4.*batch_size=1"):
        profile_routing(model, [batch])


def test_a_model_without_weights() -> None:
    model = tiny_model("olmoe")
    batch = token_batch(model)
    with pytest.raises(SieveError, match="meta device"):
        profile_routing(model.to("meta"), [batch])


def test_token_ids_of_another_vocabulary_are_refused() -> None:
    """As another model's tokenizer gives them."""
    model = tiny_model("olmoe")
    for data in ([{"input_ids": [5, 128]}], [{"input_ids": torch.tensor([[5, 128]])}]):
        with pytest.raises(SieveError, match=r"token id 128, .*128 embeddings.*own tokenizer"):
            profile_routing(model, data)


@pytest.mark.parametrize("model", [None, "out/model"])
def test_what_is_no_model_is_refused(model: Any) -> None:
    with pytest.raises(SieveError, match=f"model must be a loaded model, got {model!r}"):
        profile_routing(model, [{"input_ids": [5]}])

"""What the study's own ways of choosing experts choose."""

from __future__ import annotations

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks.study.conditions import conditions
from benchmarks.study.settings import MODEL, Settings
from benchmarks.study.step_selection import StepSelection
from benchmarks.study.training import adapted
from peft_sieve import RoutingProfile, SieveExpertLayer, SieveLoraConfig

PROFILE = RoutingProfile.from_arrays(torch.arange(1, 33).repeat(2, 1))  # the higher the id, the hotter


def test_fillers_are_as_many_as_the_hot_and_from_the_colder_half() -> None:
    choose = conditions(Settings())["hot_25_cold_25"].choose
    masks = [choose(PROFILE, seed) for seed in range(20)]
    for mask in masks:
        for experts in mask.values():
            assert set(experts) >= set(range(24, 32))
            fillers = set(experts) - set(range(24, 32))
            assert len(fillers) == 8 and max(fillers) < 16
    assert {e for mask in masks for experts in mask.values() for e in experts} == {*range(16), *range(24, 32)}
    assert choose(PROFILE, 3) == masks[3] != masks[4]


def test_a_step_changes_only_the_hottest_experts_of_its_batch() -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    layers = [f"model.layers.{n}.mlp.experts" for n in range(base.config.num_hidden_layers)]
    mask = {layer: list(range(32)) for layer in layers}
    model = get_peft_model(base, SieveLoraConfig(selected_experts=mask, r=4, lora_dropout=0.0, task_type="CAUSAL_LM"))
    adapters = {n: m for n, m in model.named_modules() if isinstance(m, SieveExpertLayer)}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch = {"input_ids": torch.randint(2, 4096, (2, 12)), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    batch["attention_mask"][1, 4:] = 0
    routed: dict[str, torch.Tensor] = {}

    def note(name: str):
        # (tokens, top_k) with the padding, which a naive loop leaves out below
        return lambda module, args, kwargs: routed.__setitem__(name, args[1])

    hooks = [m.register_forward_pre_hook(note(n), with_kwargs=True) for n, m in adapters.items()]
    selection = StepSelection(model, share=0.25)
    with selection.watching():
        for _ in range(3):  # from the second step on, the moments of the others are not zero
            batch["input_ids"] = torch.randint(2, 4096, (2, 12))
            before = {n: [p.detach().clone() for p in m.parameters() if p.requires_grad] for n, m in adapters.items()}
            selection.begin(batch["attention_mask"])
            model(**batch, labels=batch["input_ids"]).loss.backward()
            with selection.applied():
                optimizer.step()
            optimizer.zero_grad()
            for name, adapter in adapters.items():
                counts = [0] * 32
                for token, experts in enumerate(routed[name].tolist()):
                    for expert in experts:
                        counts[expert] += bool(batch["attention_mask"].flatten()[token])
                hottest = set(sorted(range(32), key=lambda e: (-counts[e], e))[:8])
                after = [p for p in adapter.parameters() if p.requires_grad]
                pairs = list(zip(before[name], after, strict=True))
                changed = {e for e in range(32) if any(not old[e].equal(new[e]) for old, new in pairs)}
                assert {e for e in hottest if counts[e]} <= changed <= hottest, name
    for hook in hooks:
        hook.remove()


def test_every_condition_trains_the_same_parts_outside_the_experts() -> None:
    layers = [f"model.layers.{n}.mlp.experts" for n in range(6)]
    values: dict[str, torch.Tensor] = {}
    for experts in ([], [3, 30], list(range(32))):
        model = adapted(dict.fromkeys(layers, experts), seed=0, settings=Settings())
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        inside = {name for name in trained if ".experts." in name}
        assert bool(inside) == bool(experts)
        outside = {name: trained[name] for name in trained.keys() - inside}
        assert sum(p.numel() for p in outside.values()) == 113664
        assert not values or all(outside[name].equal(value) for name, value in values.items())
        values = outside
        for name in inside:
            assert trained[name].shape[0] == len(experts)

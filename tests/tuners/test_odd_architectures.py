"""What some models do otherwise than the rest: weights read instead of called, models inside models, tied weights."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import DiffusionGemmaForBlockDiffusion
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashForCausalLM
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHForCausalLM
from transformers.models.zaya.modeling_zaya import ZayaForCausalLM

from peft_sieve import SieveError, SieveLoraConfig, profile_routing
from peft_sieve.moe.topology import find_moe_layers
from peft_sieve.tuners.common.exact_unmerge import ExactLinear
from tests.architectures.tiny import inputs_for, tiny_model
from tests.models import randomize_adapters, token_batch
from tests.models import tiny_model as tiny_text_model


def test_the_adapter_of_a_router_that_is_read_by_its_weight_acts() -> None:
    model = tiny_model(LongcatFlashForCausalLM)
    batch = inputs_for(model)
    config = SieveLoraConfig(r=4, calib_dataset=[batch], train_attention=False, train_shared_experts=False)
    peft_model = get_peft_model(model, config).eval()
    randomize_adapters(peft_model)
    router = model.model.layers[0].mlp.router
    assert isinstance(router.classifier, ExactLinear) and router.classifier.shows_in_weight
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    base = router.classifier.get_base_layer().weight
    a, b = router.classifier.lora_A["default"].weight, router.classifier.lora_B["default"].weight
    expected = x @ (base + 64 / 4 * b @ a).T
    assert torch.allclose(router(x)[0], expected, atol=1e-5)
    assert not torch.allclose(expected, x @ base.T, atol=1e-2)
    router(x)[0].sum().backward()
    assert a.grad.any() and b.grad.any()

    before = base.detach().clone()
    peft_model.merge_adapter()
    assert torch.allclose(router(x)[0], expected, atol=1e-4)
    with peft_model.disable_adapter():
        assert torch.allclose(router(x)[0], x @ before.T, atol=1e-5)
    peft_model.unmerge_adapter()
    assert torch.equal(base, before)


def test_the_adapter_of_a_weight_that_a_state_space_kernel_reads_acts() -> None:
    model = tiny_model(NemotronHForCausalLM)
    mask = {layer.path: [1] for layer in find_moe_layers(model)}
    mixers = [path for path, module in model.named_modules() if hasattr(module, "A_log")]
    assert mixers
    peft_model = get_peft_model(copy.deepcopy(model), SieveLoraConfig(selected_experts=mask))
    names = peft_model.base_model.targeted_module_names
    assert f"{mixers[0]}.in_proj" in names and not any(name.endswith("out_proj") for name in names)

    # PEFT's own LoRA refuses it; the kernels take what the layer calls its weight.
    config = SieveLoraConfig(r=4, selected_experts=mask, target_modules=["out_proj"])
    peft_model = get_peft_model(model, config).eval()
    randomize_adapters(peft_model)
    layer = model.get_submodule(f"{mixers[0]}.out_proj")
    base, factors = layer.get_base_layer().weight, (layer.lora_B["default"].weight, layer.lora_A["default"].weight)
    assert torch.allclose(layer.weight, base + 64 / 4 * factors[0] @ factors[1])
    x = torch.randn(3, base.shape[1], generator=torch.Generator().manual_seed(0))
    assert torch.allclose(layer(x), x @ layer.weight.T, atol=1e-4)


def test_a_model_inside_whose_paths_end_the_same_gets_no_adapter() -> None:
    model = tiny_text_model("olmoe")
    model.draft = copy.deepcopy(model)
    for layer in model.draft.model.layers:
        layer.mlp = torch.nn.Identity()  # dense: nothing in it is to be adapted
    mask = {f"model.layers.{i}.mlp.experts": [1] for i in range(2)}
    names = get_peft_model(model, SieveLoraConfig(selected_experts=mask)).base_model.targeted_module_names
    assert "model.layers.0.self_attn.q_proj" in names
    assert [name for name in names if name.startswith("draft.")] == []


@pytest.mark.parametrize("action", ["merge_adapter", "merge_and_unload"])
def test_tied_experts_are_not_merged_into(action: str) -> None:
    model = tiny_model(DiffusionGemmaForBlockDiffusion)
    batch = inputs_for(model)
    peft_model: PeftModel = get_peft_model(model, SieveLoraConfig(r=4, calib_dataset=[batch])).eval()
    randomize_adapters(peft_model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(SieveError, match="layers.0.experts share their weights.*Keep the adapter unmerged"):
        getattr(peft_model, action)()
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    peft_model.unload()


def test_skipped_tokens_do_not_count_for_the_expert_they_are_handed_to() -> None:
    model = tiny_model(ZayaForCausalLM)
    router = model.model.layers[1].mlp.gate if hasattr(model.model.layers[1].mlp, "gate") else None
    router = router or next(m for m in model.model.layers[1].modules() if type(m).__name__ == "ZayaRouter")
    router.balancing_biases.zero_()[-1] = 10.0  # now all tokens skip this layer
    profile = profile_routing(model, [token_batch(model)], progress=False)
    counts = [int(count.sum()) for count in profile.counts.values()]
    assert counts[1] == 0 and counts[0] > 0

"""Settings that PEFT or a model would stumble over later are refused by the configuration, for every method."""

from __future__ import annotations

from typing import Any

import pytest

from peft_sieve import EpngConfig, LoraMoeConfig, PerftConfig, SieveError, SieveLoraConfig
from tests.tuners.test_bad_input import assert_one_sentence

ALL = (SieveLoraConfig, EpngConfig, PerftConfig, LoraMoeConfig)
SIEVE = (SieveLoraConfig, EpngConfig)
CASES: list[tuple[tuple[type, ...], dict[str, Any], str]] = [
    (ALL, {"target_modules": 3}, "target_modules is 3"),
    (ALL, {"target_modules": ["q_proj", 3]}, "target_modules is"),
    (ALL, {"target_modules": "q_(proj"}, "no regular expression"),
    (ALL, {"exclude_modules": 3}, "exclude_modules is 3"),
    (ALL, {"exclude_modules": "*"}, "no regular expression"),
    (ALL, {"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head', expected a list of names"),
    (ALL, {"modules_to_save": [3]}, "modules_to_save is"),
    ((*SIEVE, PerftConfig), {"layers_to_transform": "1"}, "layers_to_transform is '1'"),
    ((*SIEVE, PerftConfig), {"layers_to_transform": [1.5]}, "layers_to_transform is"),
    ((*SIEVE, PerftConfig), {"layers_to_transform": True}, "layers_to_transform is True"),
    ((*SIEVE, PerftConfig), {"layers_pattern": 3, "layers_to_transform": [0]}, "layers_pattern is 3"),
    (SIEVE, {"rank_pattern": None}, "rank_pattern is None, expected a mapping"),
    (SIEVE, {"alpha_pattern": [3]}, "alpha_pattern is"),
    (SIEVE, {"alpha_pattern": {"q_proj": float("nan")}}, "is nan, expected a finite number"),
    (SIEVE, {"rank_pattern": {"q_(proj": 2}}, "no regular expression"),
    (SIEVE, {"bias": "lora-only"}, "bias is 'lora-only'"),
    (SIEVE, {"bias": None}, "bias is None"),
    (SIEVE, {"kasa_config": {}}, "kasa_config={}"),
    (SIEVE, {"velora_config": {}}, "velora_config={}"),
    (SIEVE, {"use_bdlora": {}}, "use_bdlora={}"),
    (SIEVE, {"train_router": "false"}, "train_router is 'false', expected True or False"),
    (SIEVE, {"train_attention": 1}, "train_attention is 1"),
    (SIEVE, {"expert_projections": 3}, "expert_projections is 3"),
    (SIEVE, {"lora_alpha": float("nan")}, "lora_alpha is nan"),
    (SIEVE, {"lora_alpha": float("inf")}, "lora_alpha is inf"),
    ((PerftConfig,), {"alpha": float("inf")}, "alpha is inf"),
    ((PerftConfig,), {"aux_loss_coef": float("inf")}, "aux_loss_coef is inf"),
    ((PerftConfig,), {"activation": []}, r"activation is \[\]"),
    ((PerftConfig,), {"init_weights": "no"}, "init_weights is 'no'"),
    ((PerftConfig,), {"norm_topk_prob": 1}, "norm_topk_prob is 1"),
    ((EpngConfig,), {"expert_blocks": []}, "expected mappings"),
    ((EpngConfig,), {"ledger": ""}, "expected mappings"),
]


@pytest.mark.parametrize(
    ("kind", "settings", "text"), [(kind, settings, text) for kinds, settings, text in CASES for kind in kinds]
)
def test_what_cannot_work_is_refused_in_a_sentence(kind: type, settings: dict[str, Any], text: str) -> None:
    with pytest.raises(SieveError, match=text) as caught:
        kind(**settings)
    assert_one_sentence(str(caught.value))


@pytest.mark.parametrize("kind", ALL)
def test_what_peft_takes_is_taken(kind: type) -> None:
    for value in (["q_proj", "v_proj"], {"q_proj"}, ("q_proj",), r".*\.[qv]_proj", "all-linear"):
        assert kind(target_modules=value, exclude_modules=["o_proj"], modules_to_save=["lm_head"]).target_modules

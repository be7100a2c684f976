"""Settings that PEFT or a model would stumble over later are refused by the configuration, for every method."""

from __future__ import annotations

from typing import Any

import pytest

from peft_sieve import EpngConfig, LoraMoeConfig, PerftConfig, SieveError, SieveLoraConfig
from tests.tuners.errors import assert_plain

ALL = (SieveLoraConfig, EpngConfig, PerftConfig, LoraMoeConfig)
SIEVE = (SieveLoraConfig, EpngConfig)
CASES: list[tuple[tuple[type, ...], dict[str, Any], str]] = [
    (ALL, {"target_modules": 3}, "target_modules .*3"),
    (ALL, {"target_modules": ["q_proj", 3]}, "target_modules .*q_proj.*3"),
    (ALL, {"target_modules": "q_(proj"}, r"target_modules .*q_\(proj.*regular expression"),
    (ALL, {"exclude_modules": 3}, "exclude_modules .*3"),
    (ALL, {"exclude_modules": "*"}, r"exclude_modules .*'\*'.*regular expression"),
    (ALL, {"modules_to_save": "lm_head"}, "modules_to_save .*list of names.*'lm_head'"),
    (ALL, {"modules_to_save": [3]}, r"modules_to_save .*\[3\]"),
    ((*SIEVE, PerftConfig), {"layers_to_transform": "1"}, "layers_to_transform .*'1'"),
    ((*SIEVE, PerftConfig), {"layers_to_transform": [1.5]}, r"layers_to_transform .*\[1\.5\]"),
    ((*SIEVE, PerftConfig), {"layers_to_transform": True}, "layers_to_transform .*True"),
    ((*SIEVE, PerftConfig), {"layers_pattern": 3, "layers_to_transform": [0]}, "layers_pattern .*3"),
    (SIEVE, {"rank_pattern": None}, "rank_pattern .*mapping.*None"),
    (SIEVE, {"alpha_pattern": [3]}, r"alpha_pattern .*\[3\]"),
    (SIEVE, {"alpha_pattern": {"q_proj": float("nan")}}, r"alpha_pattern\['q_proj'\] .*finite number.*nan"),
    (SIEVE, {"rank_pattern": {"q_(proj": 2}}, r"rank_pattern .*q_\(proj.*regular expression"),
    (SIEVE, {"bias": "lora-only"}, "bias .*'lora-only'"),
    (SIEVE, {"bias": None}, "bias .*None"),
    (SIEVE, {"kasa_config": {}}, "kasa_config={}"),
    (SIEVE, {"velora_config": {}}, "velora_config={}"),
    (SIEVE, {"use_bdlora": {}}, "use_bdlora={}"),
    (SIEVE, {"train_router": "false"}, "train_router .*True or False.*'false'"),
    (SIEVE, {"use_rslora": "false"}, "use_rslora .*True or False.*'false'"),
    (SIEVE, {"train_attention": 1}, "train_attention .*True or False.*1"),
    (SIEVE, {"expert_projections": 3}, "expert_projections .*3"),
    (SIEVE, {"lora_alpha": float("nan")}, "lora_alpha .*nan"),
    (SIEVE, {"lora_alpha": float("inf")}, "lora_alpha .*inf"),
    (ALL, {"lora_alpha": 10**400}, "lora_alpha must be a finite, non-zero number, got 1000"),
    (ALL, {"lora_alpha": 1e308}, "lora_alpha must be a finite, non-zero number, got 1e\\+308"),
    (ALL, {"lora_alpha": 10**5000}, "lora_alpha must be a finite, non-zero number"),
    (ALL, {"r": 2**20 + 1}, "r must be at most 1048576"),
    (ALL, {"task_type": "CAUSAL"}, "Invalid task type: 'CAUSAL'"),
    (SIEVE, {"layers_pattern": "layers"}, "`layers_to_transform` must also be specified"),
    (SIEVE, {"target_parameters": "gate.weight"}, "target_parameters must be a list of names or None"),
    (SIEVE, {"trainable_token_indices": [1.5]}, "trainable_token_indices must be a list of token ids"),
    (SIEVE, {"trainable_token_indices": {"embed_tokens": []}}, "trainable_token_indices must be"),
    ((PerftConfig,), {"lora_alpha": float("inf")}, "lora_alpha .*inf"),
    ((PerftConfig,), {"balance_loss_coef": float("inf")}, "balance_loss_coef .*inf"),
    ((PerftConfig,), {"activation": []}, r"activation .*\[\]"),
    ((PerftConfig,), {"init_lora_weights": "no"}, "init_lora_weights .*'no'"),
    ((PerftConfig,), {"norm_topk_prob": 1}, "norm_topk_prob .*1"),
    ((EpngConfig,), {"expert_blocks": []}, "expert_blocks .*mapping"),
    ((EpngConfig,), {"ledger": ""}, "ledger .*mapping"),
]


@pytest.mark.parametrize(
    ("kind", "settings", "text"), [(kind, settings, text) for kinds, settings, text in CASES for kind in kinds]
)
def test_what_cannot_work_is_refused_in_plain_words(kind: type, settings: dict[str, Any], text: str) -> None:
    with pytest.raises(SieveError, match=text) as caught:
        kind(**settings)
    assert_plain(str(caught.value))


@pytest.mark.parametrize("kind", ALL)
def test_what_peft_takes_is_taken(kind: type) -> None:
    for value in (["q_proj", "v_proj"], {"q_proj"}, ("q_proj",), r".*\.[qv]_proj", "all-linear"):
        assert kind(target_modules=value, exclude_modules=["o_proj"], modules_to_save=["lm_head"]).target_modules

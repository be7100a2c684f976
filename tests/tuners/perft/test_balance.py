"""The balance loss: its value, and that it reaches the loss of plain loops, Trainer and SFTTrainer."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func
from trl import SFTConfig, SFTTrainer

from peft_sieve import SieveError
from peft_sieve.tuners.common.balance import balance_loss
from peft_sieve.tuners.perft.layer import perft_layers
from tests.models import small_olmoe, small_tokenizer, token_batch
from tests.module_models import switch_transformers
from tests.reference import assert_same
from tests.training.runs import settings as arguments
from tests.tuners.perft.adapted import adapted, first_layer, randomize

COEF = 0.3


def labelled(model: nn.Module, **sizes: int) -> dict[str, torch.Tensor]:
    batch = token_batch(model, **sizes)
    return {**batch, "labels": batch["input_ids"].clone()}


def padded(model: nn.Module) -> dict[str, torch.Tensor]:
    batch = labelled(model)
    batch["attention_mask"][1, 7:] = 0
    batch["labels"][1, 7:] = -100
    return batch


def naive_balance(rows: list[torch.Tensor], top_k: int) -> torch.Tensor:
    """A token at a time; `rows` are logits of tokens that count."""
    num_adapters = rows[0].numel()
    shares, means = [0.0] * num_adapters, [torch.zeros(())] * num_adapters
    for row in rows:
        for i in sorted(range(num_adapters), key=lambda i: -row[i].item())[:top_k]:
            shares[i] += 1 / len(rows)
        for i, probability in enumerate(row.exp() / row.exp().sum()):
            means[i] = means[i] + probability / len(rows)
    return num_adapters * sum(share * mean for share, mean in zip(shares, means, strict=True))


def router_logits(model: PeftModel, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Of each layer, (tokens, adapters), read by hooks of the test's own."""
    found: list[torch.Tensor] = []
    routers = [layer.perft_router["default"] for layer in perft_layers(model)]
    handles = [router.register_forward_hook(lambda m, args, out: found.append(out)) for router in routers]
    model(**batch)
    for handle in handles:
        handle.remove()
    return found


def router_gradients(model: nn.Module) -> list[torch.Tensor]:
    return [layer.perft_router["default"].weight.grad for layer in perft_layers(model)]


@pytest.mark.parametrize("top_k", [1, 2])
def test_one_layer_is_as_transformers_computes_it(top_k: int) -> None:
    logits = torch.randn(24, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 12)
    mask[1, 5:] = 0
    for given, real in ((None, None), (mask, mask.flatten().bool())):
        theirs = load_balancing_loss_func((logits,), 5, top_k, given)
        probabilities = logits.softmax(-1)
        ids = probabilities.topk(top_k, dim=-1).indices
        assert_same(balance_loss(probabilities, ids, real), theirs, "loss", rtol=1e-6)
        shares = balance_loss(probabilities, ids, real, per_selection=True)
        assert_same(shares, theirs / top_k, "loss per selection", rtol=1e-6)


@pytest.mark.parametrize("top_k", [1, 2])
def test_in_float64_it_is_the_naive_loss(top_k: int) -> None:
    """Value and gradient; what is left above, in float32, is the order of the sums."""
    logits = torch.randn(24, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    real = torch.arange(24) % 5 != 0
    probabilities = logits.softmax(-1)
    fast = balance_loss(probabilities, probabilities.topk(top_k, dim=-1).indices, real)
    naive = naive_balance(list(logits[real]), top_k)
    assert_same(fast.detach(), naive.detach(), "loss", rtol=1e-13)
    gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (fast, naive)]
    assert_same(*gradients, "gradient", rtol=1e-12, atol=1e-15)


def test_an_even_router_scores_top_k() -> None:
    probabilities = (torch.eye(4, dtype=torch.float64) * 1e-9).softmax(-1)
    ids = probabilities.argmax(-1, keepdim=True)
    assert balance_loss(probabilities, ids).item() == pytest.approx(1.0)


def test_the_loss_of_a_padded_batch_holds_the_naive_balance_loss() -> None:
    """Value and gradient, each layer by itself, without padding."""
    model = adapted("R", num_adapters_per_tok=2, balance_loss_coef=COEF).train()
    batch = padded(model)
    logits = router_logits(model, batch)
    real = batch["attention_mask"].flatten().bool()
    naive = COEF * torch.stack([naive_balance(list(rows[real]), 2) for rows in logits]).mean()
    with_loss = model(**batch).loss
    assert_same(model.auxiliary_loss(), naive, "auxiliary loss", rtol=1e-5)
    plain = adapted("R", num_adapters_per_tok=2, balance_loss_coef=0.0).train()
    alone = plain(**batch).loss
    assert_same(with_loss, alone + naive, "loss", rtol=1e-5)
    assert plain.auxiliary_loss().item() == 0.0

    with_loss.backward()
    alone.backward()
    naive.backward()
    # `naive` went through the model with the coefficient, into the same parameters: take it away again.
    together = router_gradients(model)
    again = adapted("R", num_adapters_per_tok=2, balance_loss_coef=COEF).train()
    again(**batch).loss.backward()
    for both, fast, task in zip(together, router_gradients(again), router_gradients(plain), strict=True):
        assert_same(fast - task, both - fast, "router gradient", rtol=1e-3, atol=1e-4)


def test_a_loss_made_by_hand_adds_it() -> None:
    model = adapted("R", balance_loss_coef=COEF).train()
    batch = labelled(model)
    expected = model(**batch).loss
    labels = batch.pop("labels")
    logits = model(**batch).logits
    by_hand = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(by_hand + model.auxiliary_loss(), expected, "loss", rtol=1e-5)
        model(**batch)


def test_a_balance_loss_that_nobody_takes_is_said() -> None:
    model = adapted("R").train()
    batch = token_batch(model)
    model(**batch)
    with pytest.warns(UserWarning, match=r"was not used.*model.auxiliary_loss\(\)"):
        model(**batch)


def test_a_loss_that_calls_the_backbone_alone_has_it_too() -> None:
    """As those that never make logits."""
    model = adapted("R").train()
    batch = token_batch(model)
    model(**batch)
    expected = model.auxiliary_loss()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.get_base_model().model(**batch)
    found = model.auxiliary_loss()
    assert found is not expected and torch.equal(found, expected)
    model.get_base_model().model(**batch)
    with pytest.warns(UserWarning, match="was not used"):
        model.get_base_model().model(**batch)
    # After a forward that failed, all is as before it.
    with pytest.raises(IndexError):
        model.get_base_model().model(input_ids=batch["input_ids"] + 10**6)
    model(**batch)
    assert torch.equal(model.auxiliary_loss(), expected)


def test_evaluation_adds_nothing() -> None:
    model, plain = adapted("R", balance_loss_coef=COEF).eval(), adapted("R", balance_loss_coef=0.0).eval()
    batch = labelled(model)
    assert torch.equal(model(**batch).loss, plain(**batch).loss)
    with pytest.raises(SieveError, match="no forward in training mode"):
        model.auxiliary_loss()
    with torch.no_grad():
        assert torch.equal(model.train()(**batch).loss, plain.train()(**batch).loss)


@pytest.mark.parametrize("return_dict", [True, False])
def test_with_tuples_too(return_dict: bool) -> None:
    model = adapted("R", balance_loss_coef=COEF).train()
    loss = model(**labelled(model), return_dict=return_dict)[0]
    plain = adapted("R", balance_loss_coef=0.0).train()
    assert_same(loss, plain(**labelled(model))[0] + model.auxiliary_loss(), "loss", rtol=1e-6)


def test_batches_of_a_step_add_up_to_the_loss_of_all_their_tokens() -> None:
    """`num_items_in_batch`, with which the Trainer accumulates: each batch counts by its share of the labels."""
    model = adapted("R", balance_loss_coef=COEF).train()
    batches = [padded(model), labelled(model, batch=1, length=5)]
    sizes = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    means, shares = [], []
    for batch, size in zip(batches, sizes, strict=True):
        means.append(model(**batch).loss * size / sum(sizes))
        shares.append(model(**batch, num_items_in_batch=torch.tensor(sum(sizes))).loss)
    assert_same(torch.stack(shares), torch.stack(means), "losses", rtol=1e-5)


def test_several_active_adapters_each_add_theirs() -> None:
    model = adapted("R", balance_loss_coef=COEF)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.add_adapter("dense", type(model.peft_config["default"])(variant="D"))
    randomize(model)
    for layer in perft_layers(model):
        for factor in layer.perft_B.values():
            # So that adapters change nothing of what the next router reads.
            factor.weight.data.zero_()
    model.train()
    batch = labelled(model)
    alone = []
    for name in ("default", "other"):
        model.set_adapter(name)
        model(**batch)
        alone.append(model.auxiliary_loss())
    model.base_model.set_adapter(["default", "other", "dense"])
    model(**batch)
    assert alone[0] != alone[1]
    assert_same(model.auxiliary_loss(), alone[0] + alone[1], "auxiliary loss", rtol=1e-6)


def test_encoder_and_decoder_have_masks_of_their_own() -> None:
    model = adapted("R", switch_transformers(), balance_loss_coef=COEF, task_type="SEQ_2_SEQ_LM").train()
    batch = token_batch(model, length=6)
    batch["attention_mask"][0, 4:] = 0
    labels = batch["input_ids"].clone()
    labels[2, 3:] = -100
    batch |= {"labels": labels}
    logits = router_logits(model, batch)
    masks = [
        batch["attention_mask"] if "encoder" in layer.path.split(".") else labels != -100
        for layer in perft_layers(model)
    ]
    losses = [naive_balance(list(rows[mask.flatten().bool()]), 2) for rows, mask in zip(logits, masks, strict=True)]
    assert_same(model.auxiliary_loss(), COEF * torch.stack(losses).mean(), "auxiliary loss", rtol=1e-5)


def test_checkpointed_layers_give_the_same_and_reentrant_ones_are_refused() -> None:
    plain, model = adapted("R", balance_loss_coef=COEF).train(), adapted("R", balance_loss_coef=COEF).train()
    batch = labelled(model)
    plain(**batch).loss.backward()
    model.gradient_checkpointing_enable()
    model(**batch).loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(router_gradients(model), router_gradients(plain), strict=True))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(SieveError, match="use_reentrant"):
        model(**batch)


def test_a_model_is_copied_in_the_middle_of_training() -> None:
    model = adapted("R").train()
    batch = labelled(model)
    model(**batch)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**batch).loss, model(**batch).loss)
    assert first_layer(twin) is not first_layer(model)
    with torch.no_grad():
        first_layer(twin).perft_B["default"].weight.zero_()
    assert not torch.equal(twin(**batch).loss, model(**batch).loss), "the copy runs the adapters of the original"


# Trainers


@pytest.fixture(scope="module")
def texts() -> Dataset:
    words = ["Tom has three apples", "and buys two more of them at the market", "how many pens", "does each friend get"]
    return Dataset.from_list([{"text": " ".join(words[: i + 1])} for i in range(4)])


class First:
    """Mixed into a trainer: losses and the gradients of each micro-batch's step."""

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(model, *args, **kwargs)  # type: ignore[misc]
        self.losses = [*getattr(self, "losses", []), loss.item()]
        self.auxiliary = [*getattr(self, "auxiliary", []), self.model.base_model.auxiliary_loss().item()]
        self.gradients = [gradient.clone() for gradient in router_gradients(model)]
        return loss


class FirstTrainer(First, Trainer):
    pass


class FirstSFT(First, SFTTrainer):
    pass


def train(kind: str, coef: float, texts: Dataset, folder: Path, **changes: Any) -> First:
    """One step with random adapters."""
    changes = {"max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-3, **changes}
    model = adapted("R", small_olmoe(), balance_loss_coef=coef)
    if kind == "sft":
        fixed = {"bf16": False, "gradient_checkpointing": False}
        args: Any = SFTConfig(**arguments(folder, **{**fixed, **changes}))
        trainer: Any = FirstSFT(model=model, args=args, train_dataset=texts, processing_class=small_tokenizer())
    else:
        tokens = [small_tokenizer()(text).input_ids for text in texts["text"]]
        trainer = FirstTrainer(
            model=model,
            args=TrainingArguments(**arguments(folder, **changes)),
            train_dataset=Dataset.from_dict({"input_ids": tokens}),
            data_collator=DataCollatorForLanguageModeling(small_tokenizer(), mlm=False),
        )
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", ["trainer", "sft"])
@pytest.mark.parametrize("steps", [1, 2])
def test_trainers_add_it_in_value_and_gradient(kind: str, steps: int, texts: Dataset, tmp_path: Path) -> None:
    """Accumulated batches count by their share (Trainer), or equally, as SFTTrainer does with the model's own."""
    changes = {"gradient_accumulation_steps": steps}
    plain = train(kind, 0.0, texts, tmp_path, **changes)
    with_loss = train(kind, COEF, texts, tmp_path, **changes)
    assert len(with_loss.losses) == steps
    gained = [a - b for a, b in zip(with_loss.losses, plain.losses, strict=True)]
    assert plain.auxiliary == [0.0] * steps
    if kind == "sft" or steps == 1:
        assert gained == pytest.approx([value / steps for value in with_loss.auxiliary], rel=1e-3)
    else:
        shares = [gain / value for gain, value in zip(gained, with_loss.auxiliary, strict=True)]
        assert sum(shares) == pytest.approx(1.0, rel=1e-3) and shares[0] != pytest.approx(0.5, rel=1e-2)
    for one, other in zip(with_loss.gradients, plain.gradients, strict=True):
        assert not torch.allclose(one, other, rtol=1e-2), "no gradient from the balance loss"

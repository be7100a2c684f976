"""The model card of a saved adapter: what it tells is true, and what others wrote into it stays."""

from __future__ import annotations

import copy
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from peft_sieve import SieveLoraConfig
from peft_sieve.hf.card import END, START
from tests.adapters.saved import SHARED, saved_adapter
from tests.hf.saver import METHODS
from tests.models import randomize_adapters, tiny_model, token_batch

PLACE = "REPO_OR_PATH_OF_THIS_ADAPTER"


@dataclass
class Saved:
    base: PreTrainedModel
    batch: dict[str, torch.Tensor]
    model: PeftModel
    path: Path

    @property
    def text(self) -> str:
        return (self.path / "README.md").read_text(encoding="utf-8")

    def logits(self, model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(**self.batch).logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Calibrated on two batches, with another number of experts in each layer."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_model("olmoe").save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    batches = [token_batch(base, seed=seed) for seed in (0, 1)]
    config = SieveLoraConfig(r=4, strategy="coverage", score="mass", calib_dataset=batches, task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(base), config)
    randomize_adapters(model)
    model.save_pretrained(folder / "adapter")
    return Saved(base, batches[0], model, folder / "adapter")


def sieve(**settings: Any) -> SieveLoraConfig:
    mask = {"model.layers.0.mlp.experts": [1, 6], "model.layers.1.mlp.experts": [0]}
    return SieveLoraConfig(**{"r": 4, "selected_experts": mask, "task_type": "CAUSAL_LM", **settings})


def test_the_code_block_loads_the_adapter(saved: Saved) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", saved.text, re.DOTALL)
    assert [line.split("#")[0].strip() for line in code.splitlines()][:2] == [
        "import peft_sieve",
        "from peft import AutoPeftModelForCausalLM",
    ]
    assert code.count(PLACE) == 1
    names: dict[str, Any] = {}
    exec(code.replace(PLACE, str(saved.path)), names)
    assert torch.equal(saved.logits(names["model"]), saved.logits(saved.model))


def test_it_tells_what_the_experts_were_chosen_by(saved: Saved) -> None:
    config = saved.model.peft_config["default"]
    known = config.calibration
    assert (known["samples"], known["tokens"]) == (6, 72)
    assert f"Calibrated on 6 samples (72 tokens) of `{known['dataset']}`" in saved.text
    assert "score `mass`, strategy `coverage`" in saved.text
    masks = config.selected_experts
    assert len({len(ids) for ids in masks.values()}) > 1, "the layers cannot be told apart"
    rows = re.findall(r"^\| (model\S+) \| (\d+) of (\d+) \| ([\d.]+)% \|$", saved.text, re.MULTILINE)
    assert {path: (int(found), int(total)) for path, found, total, _ in rows} == {
        path: (len(ids), 8) for path, ids in masks.items()
    }
    for path, *_, coverage in rows:
        assert float(coverage) == pytest.approx(100 * known["coverage"][path], abs=0.05)
    assert f"on {sum(map(len, masks.values()))} of 16 routed experts" in saved.text
    assert "(rank 4)" in saved.text


def test_experts_given_by_hand_have_no_provenance(saved: Saved, tmp_path: Path) -> None:
    get_peft_model(copy.deepcopy(saved.base), sieve()).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "Calibrated on" not in text and "None" not in text and "one adapter per layer" not in text
    assert "| model.layers.0.mlp.experts | 2 of 8 |  |" in text


@pytest.mark.parametrize("shared", SHARED)
def test_it_tells_what_experts_share(shared: str, tmp_path: Path) -> None:
    adapter = saved_adapter(tmp_path, "olmoe", **SHARED[shared])
    text = (adapter.path / "README.md").read_text()
    hot = sum(map(len, adapter.model.peft_config["default"].selected_experts.values()))
    assert f"on {hot} of 16 routed experts" in text
    together = f", and one adapter per layer that the other {16 - hot} use together, "
    assert (together in text) == ("cold_experts" in SHARED[shared])
    assert ("B of down_proj one per layer" in text) == ("share_outer" in SHARED[shared])
    assert f" {adapter.model.get_nb_trainable_parameters()[0]:,} parameters," in text


def test_its_size_is_that_of_the_file(saved: Saved) -> None:
    tensors = load_file(saved.path / "adapter_model.safetensors")
    count = sum(tensor.numel() for name, tensor in tensors.items() if not name.endswith("slots"))
    assert f" {count:,} parameters," in saved.text
    assert count == saved.model.get_nb_trainable_parameters()[0]


def test_each_adapter_has_its_own_size(saved: Saved, tmp_path: Path) -> None:
    model = get_peft_model(copy.deepcopy(saved.base), sieve())
    model.add_adapter("second", sieve(r=2, train_attention=False))
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.count("## Sparse expert adapter") == 2 and "## Sparse expert adapter (`second`)" in text
    for folder in ("", "second"):
        tensors = load_file(tmp_path / folder / "adapter_model.safetensors")
        count = sum(tensor.numel() for name, tensor in tensors.items() if not name.endswith("slots"))
        assert text.count(f" {count:,} parameters,") == 1


def test_the_size_in_megabytes(tmp_path: Path) -> None:
    """In the type that the adapter is saved in: here bfloat16, 2 bytes each."""
    model = get_peft_model(tiny_model("olmoe", dtype=torch.bfloat16), sieve(r=512), autocast_adapter_dtype=False)
    count = model.get_nb_trainable_parameters()[0]
    assert f"{count:,} parameters, {2 * count / 1e6:.1f} MB." in new_card(model, tmp_path)


def new_card(model: PeftModel, folder: Path) -> str:
    model.create_or_update_model_card(str(folder))
    return (folder / "README.md").read_text()


@pytest.mark.parametrize("name", ["allenai/OLMoE-1B-7B-0924", "gpt2"])
def test_a_base_model_of_the_hub_is_linked_and_in_the_metadata(saved: Saved, name: str, tmp_path: Path) -> None:
    text = new_card(get_peft_model(named(saved.base, name), sieve()), tmp_path)
    assert f"[{name}](https://huggingface.co/{name})" in text
    assert ModelCard(text).data["base_model"] == name
    assert f"base_model:adapter:{name}" in ModelCard(text).data["tags"]


def named(base: PreTrainedModel, name: str) -> PreTrainedModel:
    """As if it had been loaded by that name."""
    clone = copy.deepcopy(base)
    clone.name_or_path = clone.config._name_or_path = name
    return clone


def test_a_base_model_on_disk_is_told_where_peft_tells_it(saved: Saved, tmp_path: Path) -> None:
    """In a saved card. The Hub refuses a card whose base model is no repository, so one that is pushed does not."""
    path, card = saved.base.name_or_path, ModelCard(saved.text)
    assert f"`{path}`" in card.text
    assert card.data["base_model"] == path and f"base_model:adapter:{path}" in card.data["tags"]
    shutil.copy(saved.path / "README.md", tmp_path)
    pushed = ModelCard(new_card(saved.model, tmp_path))
    assert f"`{path}`" in pushed.text and pushed.data.get("base_model") is None
    assert [tag for tag in pushed.data["tags"] if "base_model" in tag] == []


@pytest.mark.parametrize("method", METHODS)
def test_every_method_saves_the_name_of_its_base(method: str, tmp_path: Path) -> None:
    """As PEFT does, whatever it is: here a model that was never loaded has none."""
    model = get_peft_model(tiny_model("olmoe"), METHODS[method][0]())
    model.save_pretrained(tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data["base_model"] == model.config.to_dict()["_name_or_path"]


def test_the_metadata_makes_it_findable(saved: Saved) -> None:
    data = ModelCard(saved.text).data
    assert (data.library_name, data.pipeline_tag) == ("peft", "text-generation")
    assert {"lora", "peft_sieve", "mixture-of-experts"} <= set(data["tags"])
    assert len(set(data["tags"])) == len(data["tags"])


def test_a_fresh_card_has_no_blanks_to_fill_in(saved: Saved) -> None:
    assert "[More Information Needed]" not in saved.text
    assert "Model Card for Model ID" not in saved.text
    assert saved.text.count("\n# ") == 1


# Cards that are there already


def test_saving_again_replaces_the_section(saved: Saved, tmp_path: Path) -> None:
    saved.model.save_pretrained(tmp_path)
    once = (tmp_path / "README.md").read_text()
    saved.model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == once
    other = get_peft_model(copy.deepcopy(saved.base), sieve(r=2))
    other.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.count(START) == text.count(END) == text.count("## Sparse expert adapter") == 1
    assert "(rank 2)" in text and "(rank 4)" not in text and "Calibrated on" not in text


OWN = """---
license: apache-2.0
language:
- en
datasets:
- me/corpus
---
# My adapter

It answers questions. Ünïcode, too.

## How it was made

```python
train()
```
"""


def test_what_a_user_wrote_is_kept(saved: Saved, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(OWN, encoding="utf-8")
    for _ in range(2):
        saved.model.save_pretrained(tmp_path)
        text = readme.read_text(encoding="utf-8")
        assert OWN.split("---\n")[2].strip() in text
        assert text.count(START) == 1
        data = ModelCard(text).data
        assert (data.license, data.language, data.datasets) == ("apache-2.0", ["en"], ["me/corpus"])
        assert data.library_name == "peft"
    own, ours, after = re.split(f"{START}|{END}", text)
    edited = f"{own}More of mine, before.\n\n{START}{ours}{END}\n\nMore of mine, after.{after}"
    readme.write_text(edited, encoding="utf-8")
    saved.model.save_pretrained(tmp_path)
    again = readme.read_text(encoding="utf-8")
    assert again.count(START) == 1
    for line in ("More of mine, before.", "More of mine, after.", "It answers questions. Ünïcode, too."):
        assert again.count(line) == 1
    saved.model.save_pretrained(tmp_path)
    assert readme.read_text(encoding="utf-8") == again


def test_a_template_that_a_user_began_to_fill_in_is_kept(saved: Saved, tmp_path: Path) -> None:
    blank = ModelCard.from_template(ModelCardData()).content
    (tmp_path / "README.md").write_text(blank.replace("### Training Data\n", "### Training Data\n\nMy corpus.\n", 1))
    saved.model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.count("My corpus.") == text.count("### Training Data") == text.count(START) == 1


def test_a_card_that_mentions_the_versions_elsewhere_keeps_its_order(saved: Saved, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("# Mine\n\nFirst.\n\n### Framework versions\n\n- torch 2\n\n## Last\n", encoding="utf-8")
    saved.model.save_pretrained(tmp_path)
    text = readme.read_text(encoding="utf-8")
    places = [text.index(part) for part in ("# Mine", "First.", START, END, "### Framework", "- torch 2", "## Last")]
    assert places == sorted(places)


# Cards of others


OTHERS = [LoraConfig(target_modules=["q_proj"]), IA3Config(target_modules=["k_proj"], feedforward_modules=[])]


@pytest.mark.parametrize("config", OTHERS, ids=["lora", "ia3"])
@pytest.mark.parametrize("there", [None, OWN])
def test_cards_of_other_methods_are_as_peft_makes_them(
    saved: Saved, config: Any, there: str | None, tmp_path: Path
) -> None:
    model = get_peft_model(copy.deepcopy(saved.base), copy.deepcopy(config))
    cards = []
    for write in (
        PeftModel.create_or_update_model_card,
        PeftModel.create_or_update_model_card._peft_sieve_original,  # type: ignore[attr-defined]
    ):
        if there is not None:
            (tmp_path / "README.md").write_text(there, encoding="utf-8")
        else:
            (tmp_path / "README.md").unlink(missing_ok=True)
        write(model, str(tmp_path))
        cards.append((tmp_path / "README.md").read_text(encoding="utf-8"))
    assert cards[0] == cards[1]
    assert "peft_sieve" not in cards[0]

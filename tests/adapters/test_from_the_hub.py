"""Adapter, LoRA and base model by their Hub ids."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from peft_sieve import SieveError, export_lora, inspect_adapter, merge_checkpoint, narrow_lora
from tests.adapters.saved import Adapter, relative_difference, saved_adapter
from tests.hub_standin import HubStandIn


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    return saved_adapter(tmp_path_factory.mktemp("olmoe"), "olmoe", save={"max_shard_size": "40KB"})


@pytest.fixture
def hub(adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    with HubStandIn() as hub:
        hub.patch_client(monkeypatch, tmp_path / "home")
        hub.add("me/base", {path.name: path.read_bytes() for path in adapter.base_path.iterdir()})
        files = {path.name: path.read_bytes() for path in adapter.path.iterdir()}
        config = files["adapter_config.json"].replace(str(adapter.base_path).encode(), b"me/base")
        hub.add("me/adapter", {**files, "adapter_config.json": config})
        hub.add("me/config-only", {"adapter_config.json": config})
        yield hub


def test_ids_will_do_everywhere(hub: HubStandIn, adapter: Adapter, tmp_path: Path) -> None:
    assert inspect_adapter("me/adapter").base_model == "me/base"
    lora = tmp_path / "lora"
    export_lora("me/adapter", lora)
    asked = [call.path for call in hub.log]
    assert any(path.startswith("/me/base/resolve/") and path.endswith("config.json") for path in asked)
    assert not any("me/base" in path and ".safetensors" in path for path in asked), "base weights were asked for"
    assert "base_model: me/base\n" in (lora / "README.md").read_text()
    model = PeftModel.from_pretrained(adapter.fresh(), lora)
    assert relative_difference(adapter.logits(model), adapter.logits()) < 1e-5

    merge_checkpoint("me/adapter", None, tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert relative_difference(adapter.logits(model), adapter.logits()) < 1e-5

    hub.add("me/lora", {path.name: path.read_bytes() for path in lora.iterdir()})
    narrow_lora("me/lora", tmp_path / "sparse", adapter.model.peft_config["default"].selected_experts)
    model = PeftModel.from_pretrained(adapter.fresh(), tmp_path / "sparse")
    assert relative_difference(adapter.logits(model), adapter.logits()) < 1e-5


def test_what_is_not_there(hub: HubStandIn, tmp_path: Path) -> None:
    for action in (
        lambda: inspect_adapter("me/nothing"),
        lambda: export_lora("me/nothing", tmp_path / "lora"),
        lambda: narrow_lora("me/nothing", tmp_path / "lora", {"a": [1]}),
    ):
        with pytest.raises(SieveError, match="No adapter can be read from 'me/nothing'"):
            action()
    with pytest.raises(SieveError, match=r"'me/config-only' does not have a readable adapter_model.safetensors"):
        inspect_adapter("me/config-only")
    with pytest.raises(SieveError, match="weights of 'me/config-only' cannot be read"):
        export_lora("me/config-only", tmp_path / "lora")
    with pytest.raises(SieveError, match="configuration of the base model 'me/none' cannot be read"):
        export_lora("me/adapter", tmp_path / "lora", base_model="me/none")

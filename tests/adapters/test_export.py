"""Plain LoRA out of a sparse adapter: what PEFT makes of it without this package, what is in it, what is refused."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import DbrxForCausalLM, JetMoeForCausalLM, Llama4ForCausalLM, NemotronHForCausalLM
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashForCausalLM
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeTalkerForConditionalGeneration

import peft_sieve.adapters.plain.export
from peft_sieve import PerftConfig, SieveError, SieveLoraConfig, export_lora
from peft_sieve.cli import main
from peft_sieve.moe.topology import find_moe_layers
from tests.adapters.saved import SHARED, Adapter, relative_difference, saved_adapter
from tests.architectures.tiny import inputs_for
from tests.architectures.tiny import tiny_model as tiny_model_of
from tests.deepseek_like import deepseek_like
from tests.models import randomize_adapters, tiny_model

REPOSITORY = Path(__file__).parents[2]
BOTH = ("olmoe", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3")
STACKED_ONLY = ("gpt_oss", "granitemoe")
CASES = [f"{name}-{layout}" for name in BOTH for layout in ("per_expert", "stacked")] + [
    f"{name}-stacked" for name in STACKED_ONLY
]
FILES = {"adapter_config.json", "adapter_model.safetensors", "README.md"}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Adapter]:
    return {name: saved_adapter(tmp_path_factory.mktemp(name), name) for name in (*BOTH, *STACKED_ONLY)}


@pytest.fixture(scope="module")
def exported(adapters: dict[str, Adapter]) -> dict[str, Path]:
    """case -> folder, exported from the saved adapter."""
    folders = {}
    for case in CASES:
        name, layout = case.rsplit("-", 1)
        folders[case] = adapters[name].path.parent / layout
        assert export_lora(str(adapters[name].path), folders[case], layout=layout).layout == layout
    return folders


@pytest.fixture(scope="module")
def elsewhere(
    adapters: dict[str, Adapter], exported: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What a process without the package makes of every export."""
    cases = [
        {
            "name": case,
            "base": str(adapters[case.rsplit("-", 1)[0]].base_path),
            "lora": str(folder),
            "batch": adapters[case.rsplit("-", 1)[0]].batch,
            "logits": adapters[case.rsplit("-", 1)[0]].logits(),
        }
        for case, folder in exported.items()
    ]
    path = tmp_path_factory.mktemp("cases") / "cases.pt"
    torch.save(cases, path)
    # From the repository, where `import peft_sieve` would find it.
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "tests" / "workers" / "plain_peft.py"), str(path)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("ROW ")]
    return {row["name"]: row for row in rows}


@pytest.mark.parametrize("case", CASES)
def test_plain_peft_and_transformers_compute_the_same_without_the_package(
    case: str, elsewhere: dict[str, dict[str, Any]]
) -> None:
    row = elsewhere[case]
    assert row["without"] > 0.1, "the adapter hardly does anything"
    assert row["peft"] < 1e-5
    assert row["transformers"] < 1e-5
    assert row["warnings"] == []
    assert row["incompatible"] == [0, 0]


@pytest.mark.parametrize("case", CASES)
def test_the_file_holds_all_experts_and_zeros_for_the_cold_ones(case: str, exported: dict[str, Path]) -> None:
    assert {path.name for path in exported[case].iterdir()} == FILES
    config = json.loads((exported[case] / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["lora_alpha"] == config["r"] == 4
    assert config["lora_dropout"] == 0
    assert config["use_rslora"] is False
    assert not any("calib" in key or "expert" in key for key in config)
    tensors = load_file(exported[case] / "adapter_model.safetensors")
    if case.endswith("stacked"):
        stacks = {key: t for key, t in tensors.items() if ".experts." in key}
        assert len(stacks) == 4 * 2  # gate_up and down, A and B, two layers
        for key, tensor in stacks.items():
            # A: (experts, ranks, in), B: (out, ranks, experts)
            ranks = 8 if ".base_layer." in key else 4
            by_expert = (
                tensor.view(8, ranks, -1).abs().amax((1, 2))
                if "lora_A" in key
                else tensor.view(-1, ranks, 8).abs().amax((0, 1))
            )
            assert int((by_expert > 0).sum()) == 2, key
        return
    keys = [key for key in tensors if ".experts." in key]
    assert len(keys) == 2 * 3 * 8 * 2  # A and B, projections, experts, layers
    hot = {key.rsplit(".", 3)[0] for key in keys if tensors[key].any()}
    assert len(hot) == 2 * 2
    assert {tensors[key].shape[0] for key in tensors if "lora_A" in key} == {4}


def test_auto_takes_what_servers_read(adapters: dict[str, Adapter], tmp_path: Path) -> None:
    for name, layout in (("olmoe", "per_expert"), ("mixtral", "per_expert"), ("gpt_oss", "stacked")):
        written = export_lora(adapters[name].path, tmp_path / name)
        assert written.layout == layout
        assert written.max_rank >= written.r == 4


def test_checkpoint_names_are_those_of_the_base_model_on_disk(
    adapters: dict[str, Adapter], exported: dict[str, Path]
) -> None:
    for name in BOTH:
        on_disk = set(load_file(adapters[name].base_path / "model.safetensors"))
        keys = load_file(exported[f"{name}-per_expert"] / "adapter_model.safetensors")
        modules = {key.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for key in keys}
        assert {f"{module}.weight" for module in modules} <= on_disk


def test_a_model_and_its_saved_adapter_give_the_same_bytes_and_no_base_weight_is_read(
    adapters: dict[str, Adapter], exported: dict[str, Path], tmp_path: Path
) -> None:
    adapter = adapters["olmoe"]
    config_only = tmp_path / "config_only"
    config_only.mkdir()
    (config_only / "config.json").write_bytes((adapter.base_path / "config.json").read_bytes())
    export_lora(adapter.model, tmp_path / "of_model", layout="per_expert")
    export_lora(adapter.path, tmp_path / "of_path", layout="per_expert", base_model=str(config_only))
    for folder in ("of_model", "of_path"):
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            ours = (tmp_path / folder / name).read_text(errors="replace").replace(str(config_only), "BASE")
            theirs = (exported["olmoe-per_expert"] / name).read_text(errors="replace")
            assert ours == theirs.replace(
                str(adapter.base_path), "BASE" if folder == "of_path" else str(adapter.base_path)
            )


@pytest.mark.parametrize("layout", ["per_expert", "stacked"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("olmoe", {"expert_projections": ["down_proj"], "rank_pattern": {}}),
        ("olmoe", {"layers_to_transform": [1], "selected_experts": {"model.layers.1.mlp.experts": [2, 5, 7]}}),
        ("olmoe", {"train_attention": False, "train_router": False, "use_rslora": True}),
        ("olmoe", {"target_modules": ["q_proj", "lm_head", "embed_tokens"]}),
        # Linear layers of the same names as the experts' projections, without an adapter.
        ("qwen2_moe", {"train_shared_experts": False}),
        *(("olmoe", options) for options in SHARED.values()),
    ],
    ids=["one projection", "one layer", "experts only", "embeddings", "no shared experts", *SHARED],
)
def test_parts_of_an_adapter(name: str, options: dict[str, Any], layout: str, tmp_path: Path) -> None:
    adapter = saved_adapter(tmp_path, name, **options)
    export_lora(adapter.path, tmp_path / "lora", layout=layout)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*adapter keys.*")
        model = PeftModel.from_pretrained(adapter.fresh(), tmp_path / "lora")
    assert relative_difference(adapter.logits(model), adapter.logits()) < 1e-5
    # Factors that are there for several experts have the rank that the configuration says, too.
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    ranks = {len(t) for key, t in tensors.items() if "lora_A" in key and layout == "per_expert"}
    assert ranks <= {model.peft_config["default"].r}


@pytest.mark.parametrize("name", STACKED_ONLY)
def test_shared_factors_in_stacks_of_other_forms(name: str, tmp_path: Path) -> None:
    """Transposed and interleaved; gate and up in one, each with its own rank."""
    adapter = saved_adapter(tmp_path, name, **SHARED["both"])
    export_lora(adapter.model, tmp_path / "lora")
    model = PeftModel.from_pretrained(adapter.fresh(), tmp_path / "lora")
    assert relative_difference(adapter.logits(model), adapter.logits()) < 1e-5


@pytest.mark.parametrize("shared", [{}, SHARED["both"]], ids=["own", "shared"])
def test_experts_in_a_module_list(shared: dict[str, Any], tmp_path: Path) -> None:
    adapter = saved_adapter(tmp_path, "deepseek_like", base=deepseek_like(), **shared)
    written = export_lora(adapter.model, tmp_path / "lora")
    assert written.layout == "per_expert"
    model = PeftModel.from_pretrained(adapter.fresh(), tmp_path / "lora")
    assert relative_difference(adapter.logits(model), adapter.logits()) < 1e-5
    # The configuration of code that comes with a checkpoint cannot be read without it: the model itself can be passed.
    export_lora(adapter.path, tmp_path / "again", base_model=adapter.base)
    assert (tmp_path / "again" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "lora" / "adapter_model.safetensors"
    ).read_bytes()
    with pytest.raises(SieveError, match="layout='stacked' does not fit a model whose experts are separate modules"):
        export_lora(adapter.model, tmp_path / "stacked", layout="stacked")


@pytest.mark.parametrize("layout", ["per_expert", "stacked"])
def test_the_router_is_left_out_on_demand_only(adapters: dict[str, Adapter], layout: str, tmp_path: Path) -> None:
    adapter = adapters["olmoe"]
    export_lora(adapter.path, tmp_path / "lora", layout=layout, include_router=False)
    assert not any(".gate." in key for key in load_file(tmp_path / "lora" / "adapter_model.safetensors"))
    assert "gate.weight" not in (tmp_path / "lora" / "adapter_config.json").read_text()
    with torch.no_grad():
        for name, parameter in adapter.model.named_parameters():
            if ".mlp.gate.lora_B" in name:
                parameter.zero_()
    expected = adapter.logits()
    adapter.model.load_adapter(str(adapter.path), "default")
    model = PeftModel.from_pretrained(adapter.fresh(), tmp_path / "lora")
    assert relative_difference(adapter.logits(model), expected) < 1e-5


def test_a_failed_export_leaves_what_was_there(
    adapters: dict[str, Adapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_lora(adapters["olmoe"].path, tmp_path / "lora")
    before = {path.name: path.read_bytes() for path in (tmp_path / "lora").iterdir()}

    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(peft_sieve.adapters.plain.export, "write_card", full_disk)
    with pytest.raises(OSError, match="No space left"):
        export_lora(adapters["olmoe"].path, tmp_path / "lora", layout="stacked")
    assert {path.name: path.read_bytes() for path in (tmp_path / "lora").iterdir()} == before


# --- refused --------------------------------------------------------------------------------------------------------


def test_what_servers_reject_is_refused(tmp_path: Path) -> None:
    adapter = saved_adapter(tmp_path, "olmoe", modules_to_save=["lm_head"])
    with pytest.raises(SieveError, match=r"modules_to_save=.*lm_head.*merge_and_unload"):
        export_lora(adapter.path, tmp_path / "lora")
    adapter = saved_adapter(tmp_path / "b", "olmoe", bias="lora_only")
    with pytest.raises(SieveError, match=r"bias='lora_only'"):
        export_lora(adapter.model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_another_base_model_is_refused_where_all_experts_share(adapters: dict[str, Adapter], tmp_path: Path) -> None:
    adapter = saved_adapter(tmp_path, "olmoe", **SHARED["all whole"])
    other = str(adapters["deepseek_v3"].base_path)  # whose first block is dense
    with pytest.raises(SieveError, match=r"has no module 'model.layers.0.mlp.experts'"):
        export_lora(adapter.path, tmp_path / "lora", base_model=other)


def test_a_layout_that_nothing_loads_is_refused(adapters: dict[str, Adapter], tmp_path: Path) -> None:
    with pytest.raises(SieveError, match=r"layout='per_expert'.* checkpoints of .* hold the experts in stacks"):
        export_lora(adapters["gpt_oss"].path, tmp_path / "lora", layout="per_expert")
    with pytest.raises(
        SieveError, match=r"layout must be one of 'auto', 'per_expert', 'stacked', 'shared_outer', got '2d'"
    ):
        export_lora(adapters["gpt_oss"].path, tmp_path / "lora", layout="2d")
    assert not (tmp_path / "lora").exists()


def test_bad_places(adapters: dict[str, Adapter], tmp_path: Path) -> None:
    adapter = adapters["olmoe"]
    (tmp_path / "file").write_text("")
    with pytest.raises(SieveError, match="is a file"):
        export_lora(adapter.path, tmp_path / "file")
    with pytest.raises(SieveError, match="holds an adapter of this package, which the export would replace"):
        export_lora(adapter.path, adapter.path)
    get_peft_model(tiny_model("olmoe"), PerftConfig(r=2)).save_pretrained(tmp_path / "perft")
    with pytest.raises(SieveError, match="holds an adapter of this package, which the export would replace"):
        export_lora(adapter.path, tmp_path / "perft")
    with pytest.raises(SieveError, match="output_dir must be a folder.*got None"):
        export_lora(adapter.path, None)
    with pytest.raises(SieveError, match=r"No adapter can be read from '.*nothing'"):
        export_lora(tmp_path / "nothing", tmp_path / "lora")
    with pytest.raises(SieveError, match="adapter must be a PeftModel, .* got 3"):
        export_lora(3, tmp_path / "lora")
    plain = get_peft_model(adapter.fresh(), LoraConfig(target_modules=["q_proj"]))
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(SieveError, match=r"an adapter of type LORA, not SIEVE_LORA"):
        export_lora(tmp_path / "plain", tmp_path / "lora")
    with pytest.raises(SieveError, match=r"adapter_name must be one of the model's sieve adapters \[\], got None"):
        export_lora(plain, tmp_path / "lora")


def test_bad_base_models(adapters: dict[str, Adapter], tmp_path: Path) -> None:
    adapter = adapters["olmoe"]
    with pytest.raises(SieveError, match=r"configuration of the base model '.*missing' cannot be read"):
        export_lora(adapter.path, tmp_path / "lora", base_model=str(tmp_path / "missing"))
    with pytest.raises(SieveError, match=r"has no module 'model.layers.0.mlp.experts'"):
        export_lora(adapter.path, tmp_path / "lora", base_model=str(adapters["granitemoe"].base_path))
    other = tiny_model("olmoe", num_experts=16)
    with pytest.raises(SieveError, match="made for experts 8"):
        export_lora(adapter.path, tmp_path / "lora", base_model=other)
    with pytest.raises(SieveError, match="must be a model of transformers, got Linear"):
        export_lora(adapter.path, tmp_path / "lora", base_model=torch.nn.Linear(2, 2))
    config = json.loads((adapter.path / "adapter_config.json").read_text())
    nameless = tmp_path / "nameless"
    nameless.mkdir()
    for path in adapter.path.iterdir():
        (nameless / path.name).write_bytes(path.read_bytes())
    (nameless / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(SieveError, match="base_model must be a model.* got None"):
        export_lora(nameless, tmp_path / "lora")
    (nameless / "adapter_model.safetensors").unlink()
    with pytest.raises(SieveError, match=r"weights of '.*nameless' cannot be read"):
        export_lora(nameless, tmp_path / "lora", base_model=adapter.base)


def adapted(model: Any, **options: Any) -> tuple[PeftModel, PeftModel]:
    """A model with a random adapter, and the same model without."""
    base = copy.deepcopy(model)
    mask = {layer.path: [i % 3, i % 3 + 3] for i, layer in enumerate(find_moe_layers(model))}
    adapter = get_peft_model(model, SieveLoraConfig(**{"r": 4, "selected_experts": mask, **options})).eval()
    randomize_adapters(adapter)
    return adapter, base


@pytest.mark.parametrize(
    "model_class",
    [
        LongcatFlashForCausalLM,  # a stack with more matrices than experts
        Llama4ForCausalLM,  # stacks that PEFT takes to be the other way round
        JetMoeForCausalLM,  # stacks in modules of their own
        Qwen3OmniMoeTalkerForConditionalGeneration,  # a model inside whose paths end the same
    ],
)
def test_odd_stacks(model_class: Any, tmp_path: Path) -> None:
    adapter, base = adapted(tiny_model_of(model_class), train_router=False)
    assert export_lora(adapter, tmp_path).layout == "stacked"
    plain = PeftModel.from_pretrained(base, tmp_path).eval()
    batch = inputs_for(base)
    with torch.no_grad():
        expected = adapter(**batch).logits
        assert relative_difference(plain(**batch).logits, expected) < 1e-5
        with plain.disable_adapter():
            assert relative_difference(plain(**batch).logits, expected) > 0.1


def test_what_plain_peft_has_no_place_for_is_refused(tmp_path: Path) -> None:
    adapter, _ = adapted(tiny_model_of(LongcatFlashForCausalLM))
    with pytest.raises(SieveError, match="reads the weight of model.layers.0.mlp.router.classifier.*include_router=F"):
        export_lora(adapter, tmp_path)
    adapter, _ = adapted(tiny_model_of(DbrxForCausalLM))
    with pytest.raises(SieveError, match="have their weights one below the other in mlp.w1, a single matrix"):
        export_lora(adapter, tmp_path)
    adapter, _ = adapted(tiny_model_of(NemotronHForCausalLM), target_modules=["out_proj"])
    with pytest.raises(SieveError, match="such a LoRA on NemotronH.*'out_proj'.*exclude_modules"):
        export_lora(adapter, tmp_path)
    assert not list(tmp_path.iterdir())


def test_several_adapters_are_told_apart_by_name(adapters: dict[str, Adapter], tmp_path: Path) -> None:
    adapter = adapters["olmoe"]
    model = PeftModel.from_pretrained(adapter.fresh(), adapter.path, adapter_name="first")
    model.add_adapter("second", SieveLoraConfig(r=2, selected_experts={"model.layers.0.mlp.experts": [1]}))
    with pytest.raises(SieveError, match=r"adapter_name must be one of .*\['first', 'second'\], got None"):
        export_lora(model, tmp_path / "lora")
    with pytest.raises(SieveError, match="adapter_name='first' goes with a PeftModel only"):
        export_lora(adapter.path, tmp_path / "lora", adapter_name="first")
    assert export_lora(model, tmp_path / "second", adapter_name="second").r == 2
    export_lora(model, tmp_path / "first", adapter_name="first")
    loaded = PeftModel.from_pretrained(adapter.fresh(), tmp_path / "first")
    assert relative_difference(adapter.logits(loaded), adapter.logits()) < 1e-5


# --- command line ---------------------------------------------------------------------------------------------------


def test_command(adapters: dict[str, Adapter], exported: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    lora = tmp_path / "lora"
    assert main(["export", str(adapters["olmoe"].path), str(lora), "--layout", "stacked"]) == 0
    assert f"plain LoRA in {lora}: layout stacked, rank 4" in (out := capsys.readouterr().out)
    assert "servers must allow rank 8" in out
    weights = "adapter_model.safetensors"
    assert (lora / weights).read_bytes() == (exported["olmoe-stacked"] / weights).read_bytes()
    assert main(["export", str(tmp_path / "nothing"), str(lora)]) == 1
    assert "peft-sieve export: No adapter can be read from" in capsys.readouterr().err
    assert main(["export", str(adapters["olmoe"].path), str(lora), "--merge", "--layout", "stacked"]) == 1
    assert "--merge cannot be combined with --layout" in capsys.readouterr().err

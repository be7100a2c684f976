"""An adapter's way over the Hub, through the real client: calibrated and pushed in one process, loaded in another."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.hub_standin import HubStandIn
from tests.models import TINY_OLMOE

ROWS = [{"text": f"Tom has {i} apples and buys {i + 2} more. How many apples does he have?"} for i in range(24)]
BASE, CORPUS, ADAPTER = "me/base", "me/corpus", "me/adapter"
FILES = {"adapter_config.json", "adapter_model.safetensors", "README.md"}

COMMON = """
import copy, json, sys
import torch
torch.set_num_threads(1)
torch.manual_seed(0)
from transformers import AutoModelForCausalLM

def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(40).reshape(2, 20) + 5).logits
"""

# Calibrates on a data set of the Hub, trains a step, pushes, trains another one, pushes again.
WRITER = (
    COMMON
    + """
import peft_sieve
from peft import get_peft_model

base = AutoModelForCausalLM.from_pretrained("me/base", dtype=torch.float32)
plain = logits(base)
config = peft_sieve.SieveLoraConfig(
    r=4, calib_dataset="me/corpus", calib_max_length=32, calib_samples=16, task_type="CAUSAL_LM"
)
model = get_peft_model(base, config)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
tokens = torch.arange(60).reshape(3, 20) + 7
outputs, commits = [], []
for _ in range(2):
    for _ in range(2):  # the first step leaves one factor of each pair as it was: the other is still zero
        model.train()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    outputs.append(logits(model))
    commits.append(model.push_to_hub("me/adapter").oid)
model.push_to_hub("me/secret", private=True)
torch.save({"plain": plain, "outputs": outputs}, sys.argv[1])
config = model.peft_config["default"]
print(json.dumps({"commits": commits, "mask": config.selected_experts, "calibration": config.calibration}))
"""
)

READER = (
    COMMON
    + """
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel

first = json.loads(input())["commits"][0]  # waits until the adapter is there
expected = torch.load(sys.argv[1])

base = AutoModelForCausalLM.from_pretrained("me/base", dtype=torch.float32)

def fresh():
    return copy.deepcopy(base)

def failure(action):
    try:
        action()
    except Exception as error:
        causes, kinds = [error], []
        while causes[-1].__cause__ or causes[-1].__context__:
            causes.append(causes[-1].__cause__ or causes[-1].__context__)
        return {"text": [str(cause) for cause in causes], "kinds": [type(cause).__name__ for cause in causes]}

without = {
    "PeftModel": failure(lambda: PeftModel.from_pretrained(fresh(), "me/adapter")),
    "AutoPeftModel": failure(lambda: AutoPeftModelForCausalLM.from_pretrained("me/adapter")),
}

import peft_sieve
import peft_sieve.tuners.sieve.model

def refuse(*args):
    raise AssertionError("calibrates again")

peft_sieve.tuners.sieve.model.calibrate = refuse

# First, while nothing is in the cache.
failures = {
    "no such repository": failure(lambda: PeftModel.from_pretrained(fresh(), "me/nothing")),
    "no such revision": failure(lambda: PeftModel.from_pretrained(fresh(), "me/adapter", revision="nothing")),
    "not allowed": failure(lambda: PeftModel.from_pretrained(fresh(), "me/secret", token=False)),
    "wrong token": failure(lambda: PeftModel.from_pretrained(fresh(), "me/secret", token="hf_wrong")),
    "cut short": failure(lambda: PeftModel.from_pretrained(fresh(), "me/broken")),
    "weights of other experts": failure(lambda: PeftModel.from_pretrained(fresh(), "me/mixed")),
    "weights of other experts, transformers": failure(lambda: fresh().load_adapter("me/mixed-too")),
}

def by_transformers():
    base = fresh()
    base.load_adapter("me/adapter")
    return base

newest, oldest = expected["outputs"][1], expected["outputs"][0]
same = {
    "PeftModel": (lambda: PeftModel.from_pretrained(fresh(), "me/adapter"), newest),
    "AutoPeftModel": (lambda: AutoPeftModelForCausalLM.from_pretrained("me/adapter", dtype=torch.float32), newest),
    "transformers": (by_transformers, newest),
    "PeftModel, older": (lambda: PeftModel.from_pretrained(fresh(), "me/adapter", revision=first), oldest),
    "AutoPeftModel, older": (
        lambda: AutoPeftModelForCausalLM.from_pretrained("me/adapter", revision=first, dtype=torch.float32), oldest
    ),
    "private": (lambda: PeftModel.from_pretrained(fresh(), "me/secret"), newest),
}
same = {way: torch.equal(logits(load()), outputs) for way, (load, outputs) in same.items()}
differ = [not torch.allclose(a, b, atol=1e-3) for a, b in ((newest, oldest), (oldest, expected["plain"]))]
mask = PeftConfig.from_pretrained("me/adapter").selected_experts
print(json.dumps({"without": without, "same": same, "differ": differ, "failures": failures, "mask": mask}))
"""
)


@pytest.fixture(scope="module")
def hub() -> Iterator[HubStandIn]:
    with HubStandIn() as hub:
        hub.add(BASE, {path.name: path.read_bytes() for path in TINY_OLMOE.iterdir()})
        hub.add(CORPUS, {"train.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS)}, repo_type="dataset")
        yield hub


@pytest.fixture(scope="module")
def story(hub: HubStandIn, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What both processes tell. The reader starts along with the writer: each spends most of its time on imports."""
    folder = tmp_path_factory.mktemp("story")
    command = [sys.executable, "-c", READER, str(folder / "outputs.pt")]
    environment = hub.environment(folder / "reader")
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as reader:
        try:
            written = hub.run(WRITER, folder / "outputs.pt", hf_home=folder / "writer")
            spoil(hub)
            printed, complaints = reader.communicate(json.dumps(written) + "\n", timeout=300)
        finally:
            reader.kill()
    assert reader.returncode == 0, complaints
    return {"written": written, "read": json.loads(printed.splitlines()[-1])}


def spoil(hub: HubStandIn) -> None:
    """Repositories with half of the weights, and with a mask that the weights do not belong to."""
    files = hub.files(ADAPTER)
    weights = files["adapter_model.safetensors"]
    hub.add("me/broken", {**files, "adapter_model.safetensors": weights[: len(weights) // 2]})
    config = json.loads(files["adapter_config.json"])
    mask = config["selected_experts"]
    path, ids = next(iter(mask.items()))
    mask[path] = sorted({*range(32)} - {*ids})[: len(ids)]
    for name in ("me/mixed", "me/mixed-too"):
        hub.add(name, {**files, "adapter_config.json": json.dumps(config)})


def test_calibrates_on_a_data_set_of_the_hub(hub: HubStandIn, story: dict[str, Any]) -> None:
    known = story["written"]["calibration"]
    assert (known["dataset"], known["samples"]) == (CORPUS, 16)
    assert any(call.path.startswith(f"/datasets/{CORPUS}/resolve/") and call.status == 200 for call in hub.log)


def test_pushes_the_adapter_and_nothing_else(hub: HubStandIn, story: dict[str, Any]) -> None:
    first, second = story["written"]["commits"]
    assert first != second
    for revision in (first, second):
        assert hub.files(ADAPTER, revision=revision).keys() - {".gitattributes"} == FILES
    config = json.loads(hub.files(ADAPTER)["adapter_config.json"])
    assert config["base_model_name_or_path"] == BASE
    assert config["selected_experts"] == story["written"]["mask"]


@pytest.mark.parametrize(
    "way", ["PeftModel", "AutoPeftModel", "transformers", "PeftModel, older", "AutoPeftModel, older", "private"]
)
def test_loads_in_another_process_to_the_bit(story: dict[str, Any], way: str) -> None:
    """And calibrates no more: the reader would raise."""
    assert story["read"]["same"][way]
    assert story["read"]["differ"] == [True, True], "the revisions cannot be told apart"
    assert story["read"]["mask"] == story["written"]["mask"]


@pytest.mark.parametrize(
    ("what", "client_error", "told"),
    [
        ("no such repository", "RepositoryNotFoundError", "me/nothing"),
        ("no such revision", "RevisionNotFoundError", "me/adapter"),
        ("not allowed", "RepositoryNotFoundError", "me/secret"),
        ("wrong token", "HfHubHTTPError", "me/secret"),
    ],
)
def test_what_cannot_be_had_is_told_as_for_every_adapter(
    story: dict[str, Any], what: str, client_error: str, told: str
) -> None:
    failure = story["read"]["failures"][what]
    assert failure["kinds"][0] == "ValueError"
    assert failure["text"][0] == f"Can't find 'adapter_config.json' at '{told}'"
    assert client_error in failure["kinds"]


@pytest.mark.parametrize("what", ["cut short", "weights of other experts", "weights of other experts, transformers"])
def test_broken_repositories_are_refused(story: dict[str, Any], what: str) -> None:
    assert story["read"]["failures"][what]["kinds"][0] == "SieveError"


@pytest.mark.parametrize("way", ["PeftModel", "AutoPeftModel"])
def test_without_the_package_the_card_has_the_answer(hub: HubStandIn, story: dict[str, Any], way: str) -> None:
    """PEFT can only name the type that it does not know."""
    failure = story["read"]["without"][way]
    assert (failure["kinds"][0], failure["text"][0]) == ("KeyError", "'SIEVE_LORA'")
    card = hub.files(ADAPTER)["README.md"].decode()
    assert "import peft_sieve" in card and "from peft import AutoPeftModelForCausalLM" in card
    assert "pip install peft-sieve" in card


def test_the_card_is_one_that_the_hub_takes(hub: HubStandIn, story: dict[str, Any]) -> None:
    """The stand-in refuses commits with bad metadata, as the Hub does."""
    card = hub.files(ADAPTER)["README.md"].decode()
    assert f"base_model: {BASE}\n" in card and "library_name: peft\n" in card
    assert f"of `{CORPUS}`" in card
    assert card.count("## Sparse expert adapter") == 1, "pushed twice"
    assert any(call.path == "/api/validate-yaml" and call.status == 200 for call in hub.log)
    assert not any(call.path == "/api/validate-yaml" and call.status != 200 for call in hub.log)


def test_nobody_else_is_asked(hub: HubStandIn, story: dict[str, Any]) -> None:
    """But `datasets` looks for a converted copy of the data set."""
    assert all("datasets-server." in call.path for call in hub.foreign_calls)

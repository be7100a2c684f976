"""The Hub stand-in against the real client: what is pushed in one process is what another one loads."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.hub_standin import HOST, HubStandIn

FILES = ("README.md", "adapter_config.json", "adapter_model.safetensors", "nested/notes é.txt")

# Runs in the writer's process. Prints the commit of each push.
PUSH = """
import json, sys
from pathlib import Path
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

api, folder = HfApi(), Path(sys.argv[1])
repo = api.create_repo("me/adapter")
assert api.create_repo("adapter", exist_ok=True).repo_id == repo.repo_id == "me/adapter"
try:
    api.create_repo("me/adapter")
except HfHubHTTPError as error:
    taken = error.response.status_code
pushed = {"user": api.whoami()["name"], "taken": taken}
pushed["first"] = api.upload_folder(repo_id="me/adapter", folder_path=folder / "first").oid
api.create_tag("me/adapter", tag="v1", revision="main")
pushed["second"] = api.upload_folder(repo_id="me/adapter", folder_path=folder / "second").oid
pushed["same"] = api.upload_folder(repo_id="me/adapter", folder_path=folder / "second").oid
api.create_branch("me/adapter", branch="less/files", revision="v1")
api.delete_file("README.md", repo_id="me/adapter", revision="less/files")
pushed["refs"] = [ref.name for ref in api.list_repo_refs("me/adapter").branches]

api.create_repo("me/secret", private=True)
api.upload_file(repo_id="me/secret", path_or_fileobj=b"hush", path_in_repo="secret.txt")
print(json.dumps(pushed))
"""

# Runs in the reader's process. Prints where the files are, and which error each request that must fail ends in.
PULL = """
import json, sys
from huggingface_hub import HfApi, HfFileSystem, hf_hub_download, snapshot_download
from huggingface_hub import errors

api, first, files = HfApi(), sys.argv[1], sys.argv[2:]
pulled = {
    "single": {file: hf_hub_download("me/adapter", file) for file in files},
    "main": snapshot_download("me/adapter"),
    "first": snapshot_download("me/adapter", revision=first),
    "v1": snapshot_download("me/adapter", revision="v1"),
    "less/files": snapshot_download("me/adapter", revision="less/files"),
    "secret": snapshot_download("me/secret"),
}
info = api.model_info("me/adapter", files_metadata=True)
weights = next(file for file in info.siblings if file.rfilename.endswith(".safetensors"))
pulled["info"] = [info.sha, info.library_name, weights.size, weights.lfs.sha256]
pulled["range"] = HfFileSystem().cat_file(f"me/adapter@v1/{weights.rfilename}", start=1000, end=1016).hex()

attempts = {
    "unknown repo": lambda: hf_hub_download("me/nothing", "config.json"),
    "unknown file": lambda: hf_hub_download("me/adapter", "nothing.json"),
    "unknown branch": lambda: hf_hub_download("me/adapter", "README.md", revision="nothing"),
    "unknown commit": lambda: snapshot_download("me/adapter", revision="0" * 40),
    "wrong token, whoami": lambda: api.whoami("hf_wrong"),
    "wrong token, public": lambda: api.model_info("me/adapter", token="hf_wrong"),
    "wrong token, private": lambda: api.model_info("me/secret", token="hf_wrong"),
    "wrong token, write": lambda: api.create_repo("me/new", token="hf_wrong"),
    "no token, private": lambda: api.model_info("me/secret", token=False),
    "no token, write": lambda: api.upload_file(
        repo_id="me/adapter", path_or_fileobj=b"x", path_in_repo="x", token=False
    ),
    "other namespace": lambda: api.create_repo("you/new"),
    "stale parent": lambda: api.upload_file(
        repo_id="me/adapter", path_or_fileobj=b"x", path_in_repo="x", parent_commit=first
    ),
    "local path as base model": lambda: api.upload_file(
        repo_id="me/adapter", path_or_fileobj=b"---\\nbase_model: /a/b\\n---\\n", path_in_repo="README.md"
    ),
}
pulled["errors"] = {}
for name, attempt in attempts.items():
    try:
        attempt()
    except Exception as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        pulled["errors"][name] = [getattr(getattr(error, "response", None), "status_code", None), *kinds]
print(json.dumps(pulled))
"""

# A tiny base model that every process builds alike, and an adapter whose B is not zero.
MODEL = """
import json, sys
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
base = LlamaForCausalLM(LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=32,
)).eval()
tokens = torch.arange(24).reshape(2, 12)
"""

PUSH_PEFT = (
    MODEL
    + """
adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
model = get_peft_model(base, adapter).eval()
with torch.no_grad():
    with model.disable_adapter():
        plain = model(tokens).logits
    logits = model(tokens).logits
torch.save({"plain": plain, "logits": logits}, sys.argv[1])
print(json.dumps(model.push_to_hub("me/peft-adapter", private=True).oid))
"""
)

LOAD_PEFT = (
    MODEL
    + """
input()  # until the adapter is there
model = PeftModel.from_pretrained(base, "me/peft-adapter").eval()
expected = torch.load(sys.argv[1])
with torch.no_grad():
    logits = model(tokens).logits
print(json.dumps({
    "equal": torch.equal(logits, expected["logits"]),
    "adapted": not torch.allclose(logits, expected["plain"], atol=1e-3),
}))
"""
)

LOAD_DATASET = """
import json
from datasets import load_dataset

print(json.dumps(load_dataset("me/data", split="train").to_list()))
"""

ROWS = [{"text": f"sentence {i}", "label": i} for i in range(5)]
JSON_LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.fixture(scope="module")
def hub() -> Iterator[HubStandIn]:
    with HubStandIn() as hub:
        yield hub


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two versions of an adapter; only the weights differ."""
    folder = tmp_path_factory.mktemp("adapter")
    for version in ("first", "second"):
        (folder / version / "nested").mkdir(parents=True)
        readme, config, weights, notes = (folder / version / file for file in FILES)
        readme.write_text("---\nlibrary_name: peft\nbase_model: me/base\ntags: [lora]\n---\n# An adapter\n")
        config.write_text('{"r": 4}')
        weights.write_bytes(os.urandom(1_000_003))
        notes.write_text("plain text")
    return folder


@pytest.fixture(scope="module")
def pushed(hub: HubStandIn, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    before = len(hub.log)
    pushed = hub.run(PUSH, folder, hf_home=tmp_path_factory.mktemp("writer"))
    return {**pushed, "log": hub.log[before:]}


@pytest.fixture(scope="module")
def pulled(hub: HubStandIn, pushed: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return hub.run(PULL, pushed["first"], *FILES, hf_home=tmp_path_factory.mktemp("reader"))


def contents(folder: Path) -> dict[str, bytes]:
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in files.items() if name != ".gitattributes"}


def test_push_makes_a_revision_each_time_and_none_for_nothing(hub: HubStandIn, pushed: dict[str, Any]) -> None:
    assert pushed["user"] == hub.user
    assert pushed["taken"] == 409
    assert pushed["first"] != pushed["second"] == pushed["same"]
    assert pushed["refs"] == ["main", "less/files"]


def test_weights_go_through_lfs_and_the_rest_through_the_commit(pushed: dict[str, Any]) -> None:
    uploads = [call for call in pushed["log"] if call.method == "PUT"]
    assert [call.status for call in uploads] == [200, 200]  # once per version: what has not changed is not sent
    assert [call.path.split("/")[-2] for call in pushed["log"]].count("commit") == 4


def test_download_in_another_process_gives_the_same_bytes(
    hub: HubStandIn, folder: Path, pulled: dict[str, Any]
) -> None:
    expected = contents(folder / "second")
    assert expected.keys() == set(FILES)
    assert {file: Path(path).read_bytes() for file, path in pulled["single"].items()} == expected
    assert contents(Path(pulled["main"])) == expected
    assert hub.files("me/adapter").items() >= expected.items()


def test_older_revisions_stay(folder: Path, pushed: dict[str, Any], pulled: dict[str, Any]) -> None:
    first = contents(folder / "first")
    assert Path(pulled["first"]).name == pushed["first"]
    assert contents(Path(pulled["first"])) == contents(Path(pulled["v1"])) == first
    assert contents(Path(pulled["less/files"])).keys() == set(FILES) - {"README.md"}
    assert bytes.fromhex(pulled["range"]) == first["adapter_model.safetensors"][1000:1016]


def test_repo_info(hub: HubStandIn, pushed: dict[str, Any], pulled: dict[str, Any]) -> None:
    sha, library, size, sha256 = pulled["info"]
    assert (sha, library, size) == (pushed["second"], "peft", 1_000_003)
    assert len(sha256) == 64
    assert contents(Path(pulled["secret"])) == {"secret.txt": b"hush"}


@pytest.mark.parametrize(
    ("attempt", "status", "error"),
    [
        ("unknown repo", 404, "RepositoryNotFoundError"),
        ("unknown file", 404, "EntryNotFoundError"),
        ("unknown branch", 404, "RevisionNotFoundError"),
        ("unknown commit", 404, "RevisionNotFoundError"),
        ("wrong token, whoami", 401, "HfHubHTTPError"),
        ("wrong token, public", 401, "HfHubHTTPError"),
        ("wrong token, private", 401, "HfHubHTTPError"),
        ("wrong token, write", 401, "HfHubHTTPError"),
        ("no token, private", 401, "RepositoryNotFoundError"),
        ("no token, write", 401, "HfHubHTTPError"),
        ("other namespace", 403, "HfHubHTTPError"),
        ("stale parent", 412, "HfHubHTTPError"),
        ("local path as base model", None, "ValueError"),
    ],
)
def test_client_raises_the_error_of_the_real_hub(
    pulled: dict[str, Any], attempt: str, status: int | None, error: str
) -> None:
    found_status, *kinds = pulled["errors"][attempt]
    assert found_status == status
    assert error in kinds
    if error == "HfHubHTTPError":
        assert "RepositoryNotFoundError" not in kinds


def test_peft_pushes_and_loads_an_adapter(hub: HubStandIn, tmp_path: Path) -> None:
    logits = str(tmp_path / "logits.pt")
    # The reader starts along with the writer and then waits for it: each spends most of its time on imports.
    command, environment = [sys.executable, "-c", LOAD_PEFT, logits], hub.environment(tmp_path / "reader")
    reader = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        sha = hub.run(PUSH_PEFT, logits, hf_home=tmp_path / "writer")
    finally:
        printed, _ = reader.communicate("pushed\n", timeout=300)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= hub.files("me/peft-adapter", revision=sha).keys()
    assert json.loads(printed.splitlines()[-1]) == {"equal": True, "adapted": True}


def test_datasets_loads_a_dataset_repo(hub: HubStandIn, tmp_path: Path) -> None:
    hub.add("me/data", {"train.jsonl": JSON_LINES}, repo_type="dataset")
    before = len(hub.foreign_calls)
    assert hub.run(LOAD_DATASET, hf_home=tmp_path) == ROWS
    asked = {urlsplit(call.path).hostname for call in hub.foreign_calls[before:]}
    assert asked <= {f"datasets-server.{HOST}"}


def test_this_process_can_be_the_client(hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    before, content = constants.ENDPOINT, b"\0" * 1000  # not text, so it goes through LFS whatever its name
    with monkeypatch.context() as patch:
        hub.patch_client(patch, tmp_path)
        huggingface_hub.create_repo("me/here", repo_type="dataset")
        huggingface_hub.upload_file(
            repo_id="me/here", repo_type="dataset", path_or_fileobj=content, path_in_repo="a/file.dat"
        )
        path = Path(huggingface_hub.hf_hub_download("me/here", "a/file.dat", repo_type="dataset"))
        assert path.read_bytes() == content == hub.files("me/here", repo_type="dataset")["a/file.dat"]
        assert path.is_relative_to(tmp_path)
    assert before == constants.ENDPOINT


def test_serves_from_a_process_of_its_own() -> None:
    command = [sys.executable, "-m", "tests.hub_standin", "--token", "hf_test"]
    root = Path(__file__).parents[1]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as server:
        try:
            settings = dict(word.split("=") for word in server.stdout.readline().split())
            connection = HTTPConnection(urlsplit(settings["HF_ENDPOINT"]).netloc)
            headers = {"Authorization": f"Bearer {settings['HF_TOKEN']}"}
            connection.request("GET", "/api/whoami-v2", headers=headers)
            assert json.load(connection.getresponse())["name"] == "me"
            connection.close()
        finally:
            server.terminate()

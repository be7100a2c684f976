"""Loads plain LoRA with PEFT and with transformers where peft_sieve cannot be imported: prints one JSON line a case.

Arguments: a file of cases, each with the paths of base model and LoRA, the batch and the expected logits.
"""

import json
import sys
import warnings


class _Blocked:
    """No importer finds the package any more, as where it is not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "peft_sieve":
            raise ModuleNotFoundError(f"No module named {name!r}")


sys.meta_path.insert(0, _Blocked())
try:
    import peft_sieve  # noqa: F401
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("peft_sieve can be imported")

import torch  # noqa: E402

torch.set_num_threads(1)
from peft import PeftModel  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402


def difference(model, case):
    with torch.no_grad():
        logits = model.eval()(**case["batch"]).logits
    return float((logits - case["logits"]).abs().max() / case["logits"].abs().max())


for case in torch.load(sys.argv[1]):
    row = {"name": case["name"]}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(case["base"]), case["lora"])
    row["peft"] = difference(model, case)
    with model.disable_adapter():
        row["without"] = difference(model, case)
    row["warnings"] = [str(w.message) for w in caught if "adapter keys" in str(w.message)]
    model = AutoModelForCausalLM.from_pretrained(case["base"])
    row["incompatible"] = [
        len(keys) for keys in (lambda r: (r.missing_keys, r.unexpected_keys))(model.load_adapter(case["lora"]))
    ]
    row["transformers"] = difference(model, case)
    print("ROW " + json.dumps(row), flush=True)

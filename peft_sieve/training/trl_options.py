"""Fields of `SieveLoraConfig` from the command line, for programs that make their `LoraConfig` of TRL's options."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from peft import LoraConfig

from ..errors import SieveError
from ..tuners.common.config import RUNTIME_ONLY
from ..tuners.sieve import SieveLoraConfig

# Carries the parsed fields, as JSON, to the processes in which TRL runs.
OPTIONS_VARIABLE = "PEFT_SIEVE_TRL_CONFIG"


def parsed_options(options: list[str]) -> dict[str, Any]:
    """The fields that FIELD=VALUE words name, after `SieveLoraConfig` has accepted them.

    Args:
        options: VALUE is JSON (true, 8, 0.25, ["gate_proj"]), a plain word, or @FILE for the JSON in a file.

    Raises:
        SieveError: no such field, or no such value of it.
    """
    parsed = dict(_parsed_option(option) for option in options)
    if parsed.get("calib_dataset") is None and parsed.get("selected_experts") is None:
        raise SieveError(
            f"--sieve gives {', '.join(parsed)} only, expected calib_dataset or selected_experts with it, to know "
            "which experts to adapt: pass --sieve calib_dataset=NAME_OR_FILE or --sieve selected_experts=@MASK.json"
        )
    SieveLoraConfig(**parsed)
    return parsed


def _parsed_option(option: str) -> tuple[str, Any]:
    name, equals, text = option.partition("=")
    defaults = {f.name: f.default for f in fields(SieveLoraConfig) if f.init} | dict.fromkeys(RUNTIME_ONLY[:2])
    if name not in defaults or not equals:
        raise SieveError(
            f"--sieve was given {option!r}, expected FIELD=VALUE with a field of SieveLoraConfig: pass one such as "
            "top_k_frac=0.25"
        )
    value = _value(name, text)
    if isinstance(defaults[name], bool) and not isinstance(value, bool):
        raise SieveError(f"--sieve was given {option!r}, expected true or false: pass {name}=true or {name}=false")
    return name, value


def _value(name: str, text: str) -> Any:
    if text.startswith("@"):
        try:
            return json.loads(Path(text[1:]).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SieveError(
                f"--sieve {name}={text} names a file that cannot be read as JSON ({error}): pass one that can"
            ) from error
    try:
        return json.loads(text)
    except ValueError:
        return text


def as_sieve_config(config: LoraConfig, options: dict[str, Any]) -> SieveLoraConfig:
    """`config` as a `SieveLoraConfig` with the fields in `options` on top."""
    given = {f.name: getattr(config, f.name) for f in fields(config) if f.init and f.name != "peft_type"}
    return SieveLoraConfig(**{**given, **options})

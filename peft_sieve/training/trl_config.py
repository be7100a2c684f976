"""Importing this has TRL's `get_peft_config` return a `SieveLoraConfig`.

TRL's commands and scripts make a `LoraConfig` of `--use_peft` and `--lora_...` there. Imported only in processes under
`peft-sieve run --sieve FIELD=VALUE`, when TRL has defined the function and nobody has taken it yet.
"""

from __future__ import annotations

import functools
import json
import os
from typing import Any

from peft import LoraConfig
from trl.trainer import utils

from ..errors import SieveError
from ..tuners.sieve import SieveLoraConfig
from .trl_options import OPTIONS_VARIABLE, as_sieve_config

_original = utils.get_peft_config


@functools.wraps(_original)
def get_peft_config(model_args: Any) -> SieveLoraConfig:
    """TRL's options as the configuration that `--sieve` asked for.

    Raises:
        SieveError: they ask for no adapter.
    """
    config = _original(model_args)
    if not isinstance(config, LoraConfig):
        raise SieveError(
            "--sieve was given to `peft-sieve run`, expected --use_peft among the options of the program, too: add it, "
            "or leave --sieve out"
        )
    return as_sieve_config(config, json.loads(os.environ[OPTIONS_VARIABLE]))


utils.get_peft_config = get_peft_config

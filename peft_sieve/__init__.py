"""peft_sieve: fine-tune Mixture-of-Experts models by adapting only the experts that a task uses.

Importing it registers the PEFT methods SIEVE_LORA, SIEVE_EPNG, PERFT and LORA_MOE.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .hf import patches as registration

registration.add_peft_types()

from .adapters.checkpoint.merge import merge_checkpoint  # noqa: E402
from .adapters.inspection import inspect_adapter  # noqa: E402
from .adapters.plain.export import ExportedLora, export_lora  # noqa: E402
from .adapters.plain.narrow import NarrowedLora, narrow_lora  # noqa: E402
from .adapters.summary import AdapterSummary  # noqa: E402
from .errors import SieveError  # noqa: E402  (the configuration needs the enumeration member)
from .moe.families.family import ExpertsShape, MoEFamily  # noqa: E402
from .moe.families.fused import FusedExperts  # noqa: E402
from .moe.families.modules import ModuleExperts  # noqa: E402
from .moe.families.registry import register_moe_family  # noqa: E402
from .routing.equivalence import PairedEquivalence, holm_correction, paired_equivalence  # noqa: E402
from .routing.profile import RoutingProfile  # noqa: E402
from .routing.profiling import profile_routing  # noqa: E402
from .routing.scores import register_score  # noqa: E402
from .routing.selection import ExpertSelection, select_experts  # noqa: E402
from .routing.stability import selection_stability, subsample_stability  # noqa: E402
from .routing.statistics import RoutingStatistics, routing_statistics  # noqa: E402
from .training.warm_up import warm_up_profile  # noqa: E402
from .tuners.common.experts.layer import SieveExpertLayer  # noqa: E402
from .tuners.epng import EpngConfig, EpngModel  # noqa: E402
from .tuners.lora_moe import LoraMoeConfig, LoraMoeModel  # noqa: E402
from .tuners.perft import PerftConfig, PerftModel  # noqa: E402
from .tuners.presets import hellora_config  # noqa: E402
from .tuners.sieve import SieveLoraConfig, SieveLoraModel  # noqa: E402

if TYPE_CHECKING:
    from .training.drift_callback import RoutingDriftCallback
    from .training.epng_callback import EpngCallback
    from .training.pruning_callback import ExpertPruningCallback

registration.register("SIEVE_LORA", SieveLoraConfig, SieveLoraModel)
registration.register("PERFT", PerftConfig, PerftModel)
registration.register("LORA_MOE", LoraMoeConfig, LoraMoeModel)
registration.register("SIEVE_EPNG", EpngConfig, EpngModel)
registration.wrap_peft()

__version__ = "0.1.0"

__all__ = [
    "AdapterSummary",
    "EpngCallback",
    "EpngConfig",
    "EpngModel",
    "ExpertPruningCallback",
    "ExpertSelection",
    "ExpertsShape",
    "ExportedLora",
    "FusedExperts",
    "LoraMoeConfig",
    "LoraMoeModel",
    "MoEFamily",
    "ModuleExperts",
    "NarrowedLora",
    "PairedEquivalence",
    "PerftConfig",
    "PerftModel",
    "RoutingDriftCallback",
    "RoutingProfile",
    "RoutingStatistics",
    "SieveError",
    "SieveExpertLayer",
    "SieveLoraConfig",
    "SieveLoraModel",
    "export_lora",
    "hellora_config",
    "holm_correction",
    "inspect_adapter",
    "merge_checkpoint",
    "narrow_lora",
    "paired_equivalence",
    "profile_routing",
    "register_moe_family",
    "register_score",
    "routing_statistics",
    "select_experts",
    "selection_stability",
    "subsample_stability",
    "warm_up_profile",
]


# These need transformers' Trainer, which takes a while to import.
_CALLBACKS = {
    "EpngCallback": "epng_callback",
    "ExpertPruningCallback": "pruning_callback",
    "RoutingDriftCallback": "drift_callback",
}


def __getattr__(name: str) -> Any:
    if name not in _CALLBACKS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".training.{_CALLBACKS[name]}", __name__), name)

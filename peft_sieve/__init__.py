"""peft_sieve: fine-tune Mixture-of-Experts models by adapting only the experts that a task uses.

Importing it registers the PEFT methods SIEVE_LORA, SIEVE_EPNG, PERFT and LORA_MOE.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .adapters.checkpoint.merge import merge_checkpoint
from .adapters.inspection import inspect_adapter
from .adapters.plain.export import ExportedLora, export_lora
from .adapters.plain.narrow import NarrowedLora, narrow_lora
from .adapters.summary import AdapterSummary
from .errors import SieveError
from .hf.patches import wrap_peft
from .moe.families.family import ExpertsShape, MoEFamily
from .moe.families.fused import FusedExperts
from .moe.families.modules import ModuleExperts
from .moe.families.registry import register_moe_family
from .routing.equivalence import PairedEquivalence, holm_correction, paired_equivalence
from .routing.profile import RoutingProfile
from .routing.profiling import profile_routing
from .routing.scores import register_score
from .routing.selection import ExpertSelection, select_experts
from .routing.stability import selection_stability, subsample_stability
from .routing.statistics import RoutingStatistics, routing_statistics
from .training.warm_up import warm_up_profile
from .tuners.common.experts.layer import SieveExpertLayer
from .tuners.epng import EpngConfig, EpngModel
from .tuners.lora_moe import LoraMoeConfig, LoraMoeModel
from .tuners.perft import PerftConfig, PerftModel
from .tuners.presets import hellora_config
from .tuners.sieve import SieveLoraConfig, SieveLoraModel

if TYPE_CHECKING:
    from .training.drift_callback import RoutingDriftCallback
    from .training.epng_callback import EpngCallback
    from .training.pruning_callback import ExpertPruningCallback

wrap_peft()

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

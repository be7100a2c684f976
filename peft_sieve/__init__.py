"""peft_sieve: fine-tune Mixture-of-Experts models by adapting only the experts that a task uses.

Importing it registers the PEFT methods SIEVE_LORA and SIEVE_EPNG.
"""

from typing import TYPE_CHECKING, Any

from . import registration

registration.add_peft_types()

from .errors import SieveError  # noqa: E402  (the configuration needs the enumeration member)
from .interop.export import ExportedLora, export_lora  # noqa: E402
from .interop.merge import merge_checkpoint  # noqa: E402
from .interop.narrow import NarrowedLora, narrow_lora  # noqa: E402
from .interop.summary import AdapterSummary, inspect_adapter  # noqa: E402
from .moe.families import ExpertsShape, FusedExperts, MoEFamily, register_moe_family  # noqa: E402
from .moe.module_experts import ModuleExperts  # noqa: E402
from .routing.equivalence import PairedEquivalence, holm_correction, paired_equivalence  # noqa: E402
from .routing.profile_data import RoutingProfile  # noqa: E402
from .routing.profiling import profile_routing  # noqa: E402
from .routing.selection import ExpertSelection, register_score, select_experts  # noqa: E402
from .routing.stability import selection_stability, subsample_stability  # noqa: E402
from .routing.statistics import RoutingStatistics, routing_statistics  # noqa: E402
from .tuners.epng import EpngConfig, EpngModel  # noqa: E402
from .tuners.sieve import SieveLoraConfig, SieveLoraModel  # noqa: E402
from .tuners.sieve.layer import SieveExpertLayer  # noqa: E402

if TYPE_CHECKING:
    from .interop.drift_callback import RoutingDriftCallback
    from .interop.epng_callback import EpngCallback

registration.register("SIEVE_LORA", SieveLoraConfig, SieveLoraModel)
registration.register("SIEVE_EPNG", EpngConfig, EpngModel)
registration.wrap_peft()

__version__ = "0.1.0"

__all__ = [
    "AdapterSummary",
    "EpngCallback",
    "EpngConfig",
    "EpngModel",
    "ExpertSelection",
    "ExpertsShape",
    "ExportedLora",
    "FusedExperts",
    "MoEFamily",
    "ModuleExperts",
    "NarrowedLora",
    "PairedEquivalence",
    "RoutingDriftCallback",
    "RoutingProfile",
    "RoutingStatistics",
    "SieveError",
    "SieveExpertLayer",
    "SieveLoraConfig",
    "SieveLoraModel",
    "export_lora",
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
]


def __getattr__(name: str) -> Any:
    # These need transformers' Trainer, which takes a while to import.
    if name == "EpngCallback":
        from .interop.epng_callback import EpngCallback

        return EpngCallback
    if name == "RoutingDriftCallback":
        from .interop.drift_callback import RoutingDriftCallback

        return RoutingDriftCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Tables and figures, drawn from routing profiles.

All return what they make and print nothing; figures are matplotlib's, shown by a notebook as they are.
"""

from .coverage import coverage_figure
from .depth import cold_figure
from .heatmap import heatmap_figure, save_heatmap
from .overlap import overlap_figure
from .page import write_report
from .stability import stability_figure
from .tables import coverage_table, layer_table, profiles_table
from .themes import DARK, LIGHT, Theme

__all__ = [
    "DARK",
    "LIGHT",
    "Theme",
    "cold_figure",
    "coverage_figure",
    "coverage_table",
    "heatmap_figure",
    "layer_table",
    "overlap_figure",
    "profiles_table",
    "save_heatmap",
    "stability_figure",
    "write_report",
]

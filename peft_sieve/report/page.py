"""A report: one self-contained HTML page, and its pictures as PNG files, from routing profiles alone."""

from __future__ import annotations

import base64
import os
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SieveError
from ..files import replaced_when_done, writing
from ..routing.comparison import check_same_layers
from ..routing.profile import RoutingProfile
from ..routing.selection import ExpertSelection, select_experts
from .canvas import DPI, as_png
from .coverage import coverage_figure
from .depth import cold_figure
from .heatmap import heatmap_figure
from .overlap import overlap_figure
from .stability import stability_figure
from .tables import layer_table, mean_coverage, profiles_table
from .themes import DARK, LIGHT, Theme

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "index.html"
_THEMES = (LIGHT, DARK)
_CSS_PIXELS_PER_DOT = 96 / DPI


@dataclass(frozen=True)
class Plot:
    """A figure of the report.

    Attributes:
        name: of its files, without suffix.
        heading, caption: text around it on the page; the caption says what to see.
        draw: makes it in a theme.
    """

    name: str
    heading: str
    caption: str
    draw: Callable[[Theme], Figure]


def _plots(
    profiles: Mapping[str, RoutingProfile], selections: Mapping[str, ExpertSelection], options: Mapping[str, Any]
) -> dict[str, list[Plot]]:
    """The figures of a report, not drawn yet: under "" those over all profiles, then those of each."""
    common = [
        Plot(
            "cold",
            "Cold experts by depth",
            "The higher a line, the more experts of the layer are nearly idle on that data.",
            lambda theme: cold_figure(profiles, theme=theme),
        ),
        Plot(
            "stability",
            "How many tokens are enough",
            "Overlap of the uniform selection by token counts with the one from all tokens, mean over layers. The "
            "lines draw dispatches one by one from a profile: real samples of as many tokens agree less, since the "
            "tokens of a text resemble each other. Markers, if any, are real samples: profiles of the same data set "
            "with fewer tokens.",
            lambda theme: stability_figure(profiles, theme=theme, **_sizes(options)),
        ),
    ]
    if len(profiles) > 1:
        overlap = Plot(
            "overlap",
            "Overlap of the data sets",
            "Jaccard overlap of the experts selected for two data sets, mean over layers: 1 for the same experts.",
            lambda theme: overlap_figure(profiles, theme=theme, **options),
        )
        common.insert(1, overlap)
    plots = {"": common}
    for name, label in _file_labels(profiles).items():
        plots[name] = _plots_of(name, label, profiles[name], selections[name], options.get("score", "count"))
    return plots


def _plots_of(name: str, label: str, profile: RoutingProfile, selection: ExpertSelection, score: str) -> list[Plot]:
    return [
        Plot(
            f"heatmap-{label}",
            f"{name}: routing",
            "Rows are layers, columns experts; the selected experts are outlined.",
            lambda theme: heatmap_figure(profile, selection, theme=theme),
        ),
        Plot(
            f"coverage-{label}",
            f"{name}: coverage",
            "The further a layer's curve is above the dashed line, the more of its routing few experts get; dots are "
            "the selection.",
            lambda theme: coverage_figure(profile, selection, score=score, title=name, theme=theme),
        ),
    ]


def write_report(
    profiles: Mapping[str, RoutingProfile],
    folder: str | os.PathLike[str],
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    **options: Any,
) -> list[Path]:
    """Draw everything that the profiles show, as PNG files (light, and dark with `-dark` in their names) and a page.

    The page holds its pictures and needs no other file; it is light or dark as its reader's system is. The files of
    an earlier report are replaced when all new ones are finished.

    Args:
        profiles: by the name to show, of one model; one for each data set.
        folder: where to write, made if it is missing.
        on_progress: called with the number of pictures drawn and to draw.
        options: of `select_experts`: what to outline, mark and compare.

    Returns:
        The files, the page first.

    Raises:
        SieveError: if matplotlib or jinja2 is not installed, the profiles are of different models, an option is out of
            range, or nothing can be written there.
    """
    check_same_layers(profiles)
    selections = {name: select_experts(profile, **options) for name, profile in profiles.items()}
    plots = _plots(profiles, selections, options)
    every = [plot for group in plots.values() for plot in group]
    template = _template()
    pictures: dict[str, bytes] = {}
    for plot in every:
        for theme in _THEMES:
            pictures[_file(plot, theme)] = as_png(plot.draw(theme))
            on_progress(len(pictures), len(every) * len(_THEMES))
    page = template.render(_contents(profiles, selections, plots, pictures, options))
    target = Path(folder)
    with writing("report", target), replaced_when_done(target, "report") as staging:
        for name, data in pictures.items():
            Path(staging, name).write_bytes(data)
        Path(staging, PAGE).write_text(page, encoding="utf-8")
    return [target / PAGE, *(target / name for name in pictures)]


def _template() -> Any:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise SieveError(
            f"The page needs jinja2, which cannot be imported ({error}). Run `pip install peft-sieve[report]`."
        ) from error
    loader = PackageLoader("peft_sieve.report", "")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined).get_template("page.html")


def _contents(
    profiles: Mapping[str, RoutingProfile],
    selections: Mapping[str, ExpertSelection],
    plots: Mapping[str, list[Plot]],
    pictures: Mapping[str, bytes],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    score = options.get("score", "count")
    anchors = _file_labels(profiles)
    sections = [
        {
            "name": name,
            "anchor": anchors[name],
            "description": _description(profile, selections[name], score),
            "figures": [_embedded(plot, pictures) for plot in plots[name]],
            "table": layer_table(profile, selections[name], score=score).to_html(),
            "selection": selections[name].to_table().to_html(),
        }
        for name, profile in profiles.items()
    ]
    first = next(iter(profiles.values()))
    return {
        "title": "Routing report",
        "subtitle": f"{_models(profiles)}{len(first.counts)} layers with experts. {_how_selected(options)}.",
        "score": "tokens" if score == "count" else score,
        "light": LIGHT,
        "dark": DARK,
        "overview": profiles_table(profiles, selections, score=score).to_html(),
        "common": [_embedded(plot, pictures) for plot in plots[""]],
        "sections": sections,
    }


def _embedded(plot: Plot, pictures: Mapping[str, bytes]) -> dict[str, Any]:
    light, dark = (pictures[_file(plot, theme)] for theme in _THEMES)
    width, height = struct.unpack(">II", light[16:24])  # of a PNG, in its first chunk
    return {
        "heading": plot.heading,
        "caption": plot.caption,
        "alt": f"{plot.heading}. {plot.caption}",
        "light": _data_uri(light),
        "dark": _data_uri(dark),
        "width": round(width * _CSS_PIXELS_PER_DOT),
        "height": round(height * _CSS_PIXELS_PER_DOT),
    }


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _description(profile: RoutingProfile, selection: ExpertSelection, score: str) -> str:
    selected, total = sum(map(len, selection.values())), sum(map(len, profile.counts.values()))
    unit = "tokens" if score == "count" else score
    share = mean_coverage(profile, selection, score)
    tokens = "" if profile.num_tokens is None else f"{profile.num_tokens:,} tokens. "
    data = profile.metadata.get("dataset")
    source = f"Data set: {data}. " if isinstance(data, str) else ""
    return f"{source}{tokens}{selected:,} of {total:,} experts selected, which get {share:.1%} of a layer's {unit}."


def _models(profiles: Mapping[str, RoutingProfile]) -> str:
    names = dict.fromkeys(profile.metadata.get("model") for profile in profiles.values())
    known = [name for name in names if isinstance(name, str) and name]
    return f"{', '.join(known)}: " if known else ""


def _how_selected(options: Mapping[str, Any]) -> str:
    """The options that matter for the strategy."""
    strategy, score = options.get("strategy", "uniform"), options.get("score", "count")
    size = f"top_k {options['top_k']}" if options.get("top_k") else f"top_k_frac {options.get('top_k_frac', 0.25)}"
    extent = f"coverage {options.get('coverage', 0.6)}" if strategy == "coverage" else size
    if strategy == "cumulative":
        extent = f"top_p {options['top_p']}" if options.get("top_p") else "the top_p of that score"
    basis = f"seed {options.get('seed', 0)}" if strategy == "random" else f"by {score}"
    return f"Experts selected: {strategy}, {basis}, {extent}"


def _sizes(options: Mapping[str, Any]) -> dict[str, Any]:
    """Of the options, how many experts: parts of a profile have counts only, and other strategies other questions."""
    return {name: options[name] for name in ("top_k_frac", "top_k") if name in options}


def _file(plot: Plot, theme: Theme) -> str:
    return f"{plot.name}.png" if theme is LIGHT else f"{plot.name}-{theme.name}.png"


def _file_labels(names: Iterable[str]) -> dict[str, str]:
    """For each name one that can stand in file names and addresses, distinct also where letter case does not count."""
    labels: dict[str, str] = {}
    for name in names:
        stem = re.sub(r"[^A-Za-z0-9._-]+", "_", name) or "_"
        label, number = stem, 2
        while label.lower() in {taken.lower() for taken in labels.values()}:
            label, number = f"{stem}_{number}", number + 1
        labels[name] = label
    return labels

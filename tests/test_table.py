"""A table as text, as HTML, and in a terminal."""

from __future__ import annotations

import io

from rich.console import Console

from peft_sieve import RoutingProfile, paired_equivalence, routing_statistics, select_experts
from peft_sieve.table import Table

TABLE = Table(("name", "n", "ids"), [("a[b]", "7", "1 2 3"), ("<c>", "1,000", "4")], ("all", "1,007", ""), wrapped=(2,))


def test_text() -> None:
    assert TABLE.to_text().split("\n") == [
        "name      n  ids  ",
        "------------------",
        "a[b]      7  1 2 3",
        "<c>   1,000  4    ",
        "------------------",
        "all   1,007       ",
    ]
    assert Table(("a", "b"), [("x", "1")]).to_text() == "a  b\n----\nx  1"


def test_html_escapes_names() -> None:
    html = TABLE.to_html()
    assert '<td style="text-align: left">&lt;c&gt;</td><td style="text-align: right">1,000</td>' in html
    assert html.count("<tr>") == 4
    assert "<tfoot>" in html
    assert "<tfoot>" not in Table(("a",), []).to_html()


def test_a_narrow_terminal_breaks_names_and_never_numbers() -> None:
    table = Table(("layer", "number"), [("model.layers.10.mlp.experts", "1,234,567")])
    console = Console(width=24, record=True, file=io.StringIO())
    console.print(table)
    text = console.export_text()
    assert "1,234,567" in text
    assert (
        "".join(line[:13].strip() for line in text.splitlines()[2:]).replace("─", "") == "model.layers.10.mlp.experts"
    )


def test_names_are_no_markup() -> None:
    console = Console(width=60, record=True, file=io.StringIO())
    console.print(TABLE)
    text = console.export_text()
    assert "a[b]" in text
    assert "1,007" in text


def test_what_a_notebook_shows() -> None:
    profile = RoutingProfile(counts={"layers.<0>": [6, 1, 1], "b": [0, 0]}, num_tokens=4, num_experts_per_tok=2)
    shown = profile._repr_html_()
    assert "RoutingProfile(2 layers x 2-3 experts, top-2, 4 tokens, without mass)" in shown
    assert "layers.&lt;0&gt;" in shown
    assert profile.to_table().rows == [("layers.<0>", "3", "8", "0", "75.0%"), ("b", "2", "0", "-", "-")]
    statistics = routing_statistics(profile)
    assert statistics.to_table().rows[0] == ("layers.<0>", "0.88", "66.7%", "75.0%", "0.670")
    assert statistics.to_table().rows[1] == ("b", "-", "-", "-", "-")
    assert statistics.to_table().summary == ("mean of the layers", "0.88", "66.7%", "75.0%", "0.670")
    assert statistics._repr_html_() == statistics.to_table().to_html()
    selection = select_experts(RoutingProfile.from_arrays([[1, 5, 4]]), top_k=2)
    assert selection.to_table().rows == [("layers.0", "2", "1 2")]
    assert "1 2</td>" in selection._repr_html_()
    named = select_experts(RoutingProfile.from_arrays([[1, 5, 4]], layer_names=["<b>"]))
    assert "&lt;b&gt;" in named._repr_html_() and "<b>" not in named._repr_html_()


def test_a_comparison_in_a_notebook() -> None:
    reference = {0: 0.50, 1: 0.54, 2: 0.46, 3: 0.51}
    found = paired_equivalence(reference, {0: 0.51, 1: 0.53, 2: 0.47, 3: 0.515}, margin=0.02)
    table = found.to_table()
    mean, within, variances, deviations = table.rows
    assert "4 seeds" in table.header[0]
    low, high = found.confidence_interval
    assert mean == ("mean difference", "+0.00375", f"{low:.3g} to {high:.3g}", f"{found.p_value:.3g}")
    assert within[0] == f"within 0.02: {'shown' if found.equivalent else 'not shown'}"
    assert within[3] == f"{found.tost_p_value:.3g}"
    assert variances[1] == f"{found.std_ratio**2:.3g}"
    assert deviations[1] == f"{found.std_ratio:.3g}"
    assert found._repr_html_() == table.to_html()

    two = paired_equivalence({0: 0.5, 1: 0.6}, {0: 0.5, 1: 0.62})
    assert two.to_table().rows[2][2:] == ("-", "-"), "two pairs say nothing of the variances"

"""A table of texts, made once and shown in a terminal, in a log, in a notebook or on a page."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table as RichTable

UNKNOWN = "-"


@dataclass(frozen=True)
class Table:
    """Texts in rows and columns. The first column is for names, the others for numbers.

    Attributes:
        header: the columns' names.
        rows: each as long as the header.
        summary: a last row over all others, or None.
        wrapped: the columns, by position, with long texts that may be broken into lines.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    summary: Sequence[str] | None = None
    wrapped: Sequence[int] = ()

    def to_text(self) -> str:
        """Names and wrapped columns to the left, numbers to the right, a rule below the header and above the summary.

        Nothing is broken into lines; no line break at the end.
        """
        lines = [self.header, *self.rows, *([] if self.summary is None else [self.summary])]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        texts = []
        for line in lines:
            cells = [
                cell.ljust(width) if self._is_left(position) else cell.rjust(width)
                for position, (cell, width) in enumerate(zip(line, widths, strict=True))
            ]
            texts.append("  ".join(cells))
        rule = "-" * len(texts[0])
        if self.summary is not None:
            texts.insert(-1, rule)
        texts.insert(1, rule)
        return "\n".join(texts)

    def to_html(self) -> str:
        """A `<table>` without styles of its own but for the alignment."""

        def row(cells: Sequence[str], tag: str) -> str:
            sides = ("left" if self._is_left(position) else "right" for position in range(len(cells)))
            written = zip(cells, sides, strict=True)
            return "".join(f'<{tag} style="text-align: {side}">{html.escape(cell)}</{tag}>' for cell, side in written)

        body = "\n".join(f"<tr>{row(cells, 'td')}</tr>" for cells in self.rows)
        foot = "" if self.summary is None else f"<tfoot><tr>{row(self.summary, 'th')}</tr></tfoot>\n"
        return f"<table>\n<thead><tr>{row(self.header, 'th')}</tr></thead>\n<tbody>\n{body}\n</tbody>\n{foot}</table>"

    def _repr_html_(self) -> str:
        return self.to_html()

    def __rich__(self) -> RichTable:
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text  # as it is: a name may hold brackets, which are rich's markup

        drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, show_footer=self.summary is not None)
        for position, name in enumerate(self.header):
            drawn.add_column(
                Text(name),
                footer=Text("" if self.summary is None else self.summary[position]),
                justify="left" if self._is_left(position) else "right",
                overflow="fold",
                no_wrap=position > 0 and position not in self.wrapped,
            )
        for cells in self.rows:
            drawn.add_row(*map(Text, cells))
        return drawn

    def _is_left(self, position: int) -> bool:
        return position == 0 or position in self.wrapped

"""Small tables that read well as text, in a notebook and in a terminal with rich."""

import html
from collections.abc import Sequence
from typing import Any, NamedTuple


class Table(NamedTuple):
    """Columns, rows and lines below.

    Attributes:
      columns: their names.
      rows: texts, one for each column.
      notes: lines below the table.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def __str__(self) -> str:
        rows = [self.columns, *self.rows]
        widths = [max(len(row[i]) for row in rows) for i in range(len(self.columns))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, *self.notes])

    def html(self) -> str:
        """For a notebook."""

        def cells(row: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

        body = "".join(cells(row, "td") for row in self.rows)
        below = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        return f"<table>{cells(self.columns, 'th')}{body}</table>{below}"

    def rich(self) -> Any:
        """For a terminal; rich, which asks for it, is there then."""
        from rich.console import Group
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(box=None, padding=(0, 2, 0, 0), header_style="bold")
        for name in self.columns:
            table.add_column(name, overflow="fold")
        for row in self.rows:
            table.add_row(*(Text(cell) for cell in row))
        return Group(table, *(Text(note) for note in self.notes))


class AsTable:
    """What has a `table` is shown by it: printed, in a notebook, and by rich."""

    @property
    def table(self) -> Table:
        raise NotImplementedError(f"{type(self).__name__} has no table.")

    def __str__(self) -> str:
        return str(self.table)

    def _repr_html_(self) -> str:
        return self.table.html()

    def __rich__(self) -> Any:
        return self.table.rich()

"""What serves each layer of a patched model, as a table."""

from __future__ import annotations

from dataclasses import dataclass
from io import StringIO

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class PartReport:
    """One part of the model."""

    layer: str
    ops: str  # in the order in which they run
    decode: str  # backend of each op for one row
    prefill: str  # and for 512
    reason: str | None  # why the part runs unfused; None: it runs fused


@dataclass(frozen=True)
class PatchReport:
    """One row per sublayer and one for the language head; prints as a table."""

    rows: tuple[PartReport, ...]
    steps: str  # which layers take whole decode steps in one native call, or why none do
    check: str  # how the parts were held against the code that they replace

    @property
    def fused(self) -> int:
        """How many rows run on the ops."""
        return sum(row.reason is None for row in self.rows)

    def __str__(self) -> str:
        table = Table("layer", "ops", "decode", "prefill", "why not", box=None, pad_edge=False)
        for row in self.rows:
            table.add_row(row.layer, row.ops, row.decode, row.prefill, row.reason or "")
        text = StringIO()
        Console(file=text, width=160).print(table)
        return f"{text.getvalue()}{self.fused} of {len(self.rows)} fused; {self.check}\n{self.steps}"

"""All tables by name, in the order in which they run."""

from benchmarks.quality import ablation, active, classification, regression
from benchmarks.quality.table import Table


def tables() -> dict[str, Table]:
    found = [*regression.TABLES, *active.TABLES, *classification.TABLES, *ablation.TABLES]
    return {table.name: table for table in found}

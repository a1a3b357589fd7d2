"""How finely a machine can tell, as a table."""

from __future__ import annotations

from eagle_lab.report.words import render
from eagle_lab.verdict.instances import InstancesRecord, estimates


def instances_table(record: InstancesRecord) -> str:
    """Markdown: what was planted and what was found, by instances and by stretches; ValueError as for `estimates`."""
    return render(
        "instances.md.j2", settings=record.settings, rows=estimates(record), environment=record.environment
    )

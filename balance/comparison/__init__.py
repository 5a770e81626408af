"""Recorded runs to comparisons, tables, figures and reports; independent of the problem that was trained."""

from ..messages import require_package

for _package in ("mlflow", "rich", "matplotlib", "jinja2"):
    require_package(_package, "compare")

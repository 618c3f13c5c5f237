"""The report: one self-contained HTML page from one or several bundles. It measures nothing; it shows what was measured."""

from .page import report
from .serve import serve

__all__ = ["report", "serve"]

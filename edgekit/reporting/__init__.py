"""The report: one self-contained HTML page from one or several bundles. It measures nothing; it shows what was measured."""

from .page import report

__all__ = ["report"]

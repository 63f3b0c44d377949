"""One HTML page of everything that a run left in its folder."""

from .build import write_report

__all__ = ["write_report"]

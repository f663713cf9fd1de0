"""Unintended use, where `evaluate.load` looks for it. The metric is selfreg's."""

from selfreg.evaluation.hf_metrics import UnintendedUse  # From: git+https://github.com/selfreg/selfreg

__all__ = ["UnintendedUse"]

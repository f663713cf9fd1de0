"""Leakage, where `evaluate.load` looks for it. The metric is selfreg's."""

from selfreg.evaluation.hf_metrics import Leakage  # From: git+https://github.com/selfreg/selfreg

__all__ = ["Leakage"]

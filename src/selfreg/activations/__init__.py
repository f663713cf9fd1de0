"""Backbone -> hidden states."""

"""Mixtures of experts, and how to read only those that were chosen."""

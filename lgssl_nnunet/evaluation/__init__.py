"""Metrics of segmentations against references, their empty-mask policy, and tables."""

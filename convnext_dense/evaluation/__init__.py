"""Metrics that write reports: results by class, confusions, curves and the worst images."""

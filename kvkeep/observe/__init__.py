"""Seeing what a keeper does: metrics, web page, traces, logs."""

"""Adapters: each is all that knows one engine."""

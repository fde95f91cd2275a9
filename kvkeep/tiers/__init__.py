"""Places below the arena: one file per kind, wrappers around them, opened by URL."""

"""Which engine holds what, and a router that asks: run as `kvkeep route`. The cache never imports it."""

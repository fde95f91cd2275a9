"""The process of one host that owns the cache there: arena, index, policy, leases. No I/O of its own."""

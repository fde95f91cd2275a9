"""What the claims are measured with: replays and benchmarks, run as `kvkeep bench NAME`."""

"""An open-loop load generator for OpenAI-compatible servers: `kvkeep bench serve`."""

"""The endpoint: an OpenAI-compatible HTTP API on top of the scheduler."""

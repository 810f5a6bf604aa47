"""Escalation: whether to call the large model at a position, the calls, and prefetched tokens."""

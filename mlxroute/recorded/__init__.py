"""Kept replies and answers of the large model, shared by bench and training."""

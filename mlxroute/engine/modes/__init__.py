"""Decode loops: wait, overlap and hedge, and the governor that picks one for auto."""

"""Negotiation: finds and remembers the most exact dialect that a server answers correctly."""

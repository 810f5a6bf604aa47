"""Negotiation: the search for the most exact dialect that a server answers correctly."""

"""Negotiation: finds and remembers the most exact way to ask a server."""

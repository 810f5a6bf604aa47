"""Dialects of the chat route: their optional fields, and the text of a chat reply."""

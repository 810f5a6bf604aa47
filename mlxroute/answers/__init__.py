"""Answer documents: an answer with the origin of every token, to save, show and replay."""

"""Training of routers with the user's own questions: score ranks, labels and heads."""

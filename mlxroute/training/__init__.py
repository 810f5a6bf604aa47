"""What a router learns from the user's own questions: score ranks, labels and heads."""

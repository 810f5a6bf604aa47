"""Question files and the grading of answers."""

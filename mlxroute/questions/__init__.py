"""Question files, and grading of answers to their questions."""

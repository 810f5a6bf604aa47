"""`bench quality`: answers of all sides, their figures, comparisons and oracles."""

"""Real clients of the endpoint, installed by the tests; they run with --heavy only."""

"""Exit codes of the command line."""

EXIT_OK, EXIT_USAGE, EXIT_LARGE_FAILED, EXIT_INTERRUPTED = 0, 2, 3, 130

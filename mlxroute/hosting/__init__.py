"""A large model served on this machine by a child process."""

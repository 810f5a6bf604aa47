"""The commands, one file each: a function with the command's own options, and what it does."""

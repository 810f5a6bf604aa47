"""How each family of servers is asked for one token, and what its reply means; no I/O."""

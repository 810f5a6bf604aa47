"""Labels that say how much an escalation helps, and heads chosen by what they help."""

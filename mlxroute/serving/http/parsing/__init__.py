"""Request bodies: JSON to checked values, with errors in the form that OpenAI's clients expect."""

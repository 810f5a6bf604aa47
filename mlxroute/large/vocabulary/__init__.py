"""Two vocabularies: prompts for the large model, and its tokens as ids of the small model."""

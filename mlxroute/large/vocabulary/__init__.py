"""Two vocabularies: prompts for the large model, its tokens in the small model's ids."""

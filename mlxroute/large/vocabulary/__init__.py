"""Both vocabularies: prompts for the large model, and its tokens in the small vocabulary."""

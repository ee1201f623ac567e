"""Routes beside generation: models, health, tokenizer, information, control."""

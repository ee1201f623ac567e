"""Routes other than generation: models, health, tokenizer, output parsers, information, control."""

"""OpenAI's Responses, over a chat."""

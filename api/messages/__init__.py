"""Anthropic's Messages, over a chat."""

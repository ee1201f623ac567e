"""The text of an answer read as a message: reasoning, content and tool calls."""

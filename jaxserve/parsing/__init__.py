"""Parses model output into an assistant message: reasoning, content and tool calls."""

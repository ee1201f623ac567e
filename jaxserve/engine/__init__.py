"""The engine: its step loop, its process, and its clients."""

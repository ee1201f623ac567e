"""The engine: its step loop, its process, and the clients that reach it."""

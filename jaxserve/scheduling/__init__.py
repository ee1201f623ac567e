"""What each step runs. Pure Python."""

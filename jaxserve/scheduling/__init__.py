"""The scheduler, which decides what each step runs. Pure Python."""

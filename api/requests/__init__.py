"""From a decoded body to an engine request, and what all protocols share."""

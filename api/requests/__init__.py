"""Building and running engine requests from decoded bodies: code shared by all protocols."""

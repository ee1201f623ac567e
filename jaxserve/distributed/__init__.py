"""Several hosts running one engine: host 0 schedules, all run the same step."""

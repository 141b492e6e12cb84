"""REST API: validates, names and records container requests."""

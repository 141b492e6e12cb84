"""Plain pages for the addresses that clients print to people: what the API tells, with HTML around it."""

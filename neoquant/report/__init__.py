"""Results in a form for people: pure functions of results."""

"""What makes the course and is no part of it: recorders, the form of the notebooks, README's tables."""

"""What a notebook measures with on the reader's machine, and what tools/ records data/results with."""

"""From requirements to a decision: memory, cost, accuracy, fronts; it computes, and figures/ draws."""

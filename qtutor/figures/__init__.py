"""Pictures and widgets of the notebooks, one module a topic: they draw numbers and compute none."""

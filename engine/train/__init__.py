"""The step, its session, and the loop around them."""

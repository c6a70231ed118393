"""Training: the state, the step, the loop, and the devices."""

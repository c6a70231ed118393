"""Commands: each is a function of a run, and its parameters are its options."""

"""Training: one pure step, and a loop that takes its sinks as functions."""

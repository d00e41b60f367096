"""Pure array operations without parameters: norms, rotary positions, attention, orderings."""

"""Families of public models: for each a file with its config in both directions and the table of its tensors."""

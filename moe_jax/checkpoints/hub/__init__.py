"""Checkpoints of `transformers`: their files, their `config.json`, and the tables between their tensors and ours."""

"""Model files as the field exchanges them: read one tensor at a time, under the names of Hugging Face."""

"""Commands for people, around the pipeline."""

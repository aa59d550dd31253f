"""The embedded default: simulated trials and a tiny base model, so that the pipeline runs with no download."""

"""The sections of params.yaml, one module each. Names and meanings are those of the receiving library."""

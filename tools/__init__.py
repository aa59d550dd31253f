"""Scripts that create what is committed, and checks of the code."""

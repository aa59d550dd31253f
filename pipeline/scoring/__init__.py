"""How a model is asked, and the measures of its answers."""

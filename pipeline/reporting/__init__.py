"""What is made of predictions: comparisons, pictures, the release."""

"""medical-reasoner: PubMedQA and an instruct model -> a fine-tuned, measured GGUF file."""

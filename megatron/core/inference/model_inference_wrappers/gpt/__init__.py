"""The forward pass of GPT."""

"""The forward pass of one kind of model over a window of tokens."""

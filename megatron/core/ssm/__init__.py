"""State-space layers: Mamba-2 mixers, and stacks that mix them with attention and MLP layers."""

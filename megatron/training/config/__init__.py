"""The command line: one module per group of flags, and the pass from text to configurations."""

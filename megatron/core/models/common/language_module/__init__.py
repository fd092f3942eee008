"""language module."""

"""The version, in one place."""

MAJOR, MINOR, PATCH = 1, 0, 0

__version__ = f"{MAJOR}.{MINOR}.{PATCH}"
#: The release of Megatron-LM whose command line, data files and checkpoints are the compatibility contract.
__compatible_with__ = "core_v0.9.0"

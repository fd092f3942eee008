"""Packages that may be missing, behind our signatures: nothing here is imported before it is chosen."""

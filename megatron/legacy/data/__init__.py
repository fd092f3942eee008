"""Loading of data by its older addresses."""

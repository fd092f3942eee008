"""Sentence pairs of the GLUE benchmark: MNLI and QQP."""

"""RACE: questions about a text, each with four choices."""

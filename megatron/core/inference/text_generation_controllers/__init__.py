"""From token ids of prompts to text."""

"""Downstream tasks: zero-shot evaluation of GPT, finetuning of BERT. Start with `python tasks/main.py --task NAME ...`."""

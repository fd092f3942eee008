"""Downstream tasks: zero-shot evaluation of GPT, finetuning of BERT, dialogue prompting.

Start with `python tasks/main.py --task NAME ...`, or `python tasks/msdp/main.py`.
"""

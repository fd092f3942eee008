"""What a GPT knows without finetuning: WIKITEXT103 and LAMBADA."""

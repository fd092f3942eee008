#!/usr/bin/env python3
"""Continue a prompt greedily by 100 tokens with a published model in HuggingFace's form, to compare a served one with.

python examples/inference/llama_mistral/huggingface_reference.py --model-path DIR --prompt "Hello"
"""

from __future__ import annotations

import argparse

NEW_TOKENS = 100


def main() -> None:
    """Load, continue, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompt", required=True, help="Text to continue.")
    parser.add_argument("--model-path", required=True, help="Directory or hub name of model and tokenizer.")
    args = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model_path)
    model = AutoModelForCausalLM.from_pretrained(args.model_path, torch_dtype="auto")
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    inputs = tokenizer(args.prompt, return_tensors="pt").to(model.device)
    answer = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
    print(tokenizer.decode(answer[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()

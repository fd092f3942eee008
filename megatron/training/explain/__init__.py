"""What a command line will do, worked out without running it: memory, traffic, FLOPs and time of any layout.

    from megatron.training.explain import describe, explain
    print("\\n".join(describe.lines(explain(["--num-layers", "24", ...]))))

The assumptions behind the numbers, and how they compare with published and measured runs, are in docs/scale.md.
"""

from megatron.training.explain.explanation import Explanation, Reading, explain, read, reconsider

__all__ = ["Explanation", "Reading", "explain", "read", "reconsider"]

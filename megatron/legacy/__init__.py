"""The places in which v0.9's entry scripts and plug-ins look for names of its first generation.

Programs derived from them import these whatever they build. There is no second model stack: what is the same in both
generations is here under its older address, and the older models can be named but not built.
"""

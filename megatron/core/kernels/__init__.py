"""Choice of implementations: what this machine can run, and which implementation of each operation runs on
it.
"""

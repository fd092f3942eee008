"""Multi-stage dialogue prompting: knowledge is generated first, a response from it second."""

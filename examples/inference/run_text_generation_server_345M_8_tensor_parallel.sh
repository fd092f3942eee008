#!/usr/bin/env bash
# Serve a GPT of 345M parameters on eight GPUs, every layer divided over all of them; otherwise as
# run_text_generation_server_345M.sh.
set -euo pipefail
RANKS=8 exec bash "$(dirname "$0")/run_text_generation_server_345M.sh" "$@"

#!/usr/bin/env bash
# OLMo-2-1B, its own SAE first, from fetching to the table; the same command goes on after a stop.
#   bash scripts/gpu/olmo2_1b.sh [options of featcl sweep, such as --launcher slurm --slurm partition=gpu]
# The SAE is trained by the first run (features.train of the config), on data/sae_text.jsonl.
source "$(dirname "$0")/common.sh"
need data/sae_text.jsonl 'a line {"text": …} each, some 200 million tokens of general text'
fetch_model allenai/OLMo-2-0425-1B-Instruct
make_data
study experiments/gpu/olmo2_1b "$@"

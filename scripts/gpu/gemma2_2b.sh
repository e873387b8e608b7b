#!/usr/bin/env bash
# Gemma-2-2B with Gemma Scope, from fetching to the table; the same command goes on after a stop.
#   bash scripts/gpu/gemma2_2b.sh [options of featcl sweep, such as --launcher slurm --slurm partition=gpu]
# Fetches google/gemma-2-2b-it (accept its licence, then hf auth login); the SAE comes with the first run.
source "$(dirname "$0")/common.sh"
fetch_model google/gemma-2-2b-it
make_data
study experiments/gpu/gemma2_2b "$@"

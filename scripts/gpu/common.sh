# Steps that the jobs share. Each does nothing where its result is there, so that a job goes on where it was stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
BIN=${BIN:-.venv/bin}
RAW=${RAW:-raw}            # what was downloaded: TRACE/, CL_Benchmark/, persona.jsonl, code_qa.jsonl
LIMIT=${LIMIT:-1000}       # trajectories of each source

need() {  # FILE WHAT
    [ -e "$1" ] || { echo "gpu: $1 is missing: $2" >&2; exit 2; }
}

fetch_model() {  # HUB_ID...
    for id in "$@"; do "$BIN/hf" download "$id" >/dev/null; done
}

make_data() {
    need "$RAW/TRACE" "put TRACE's folder of tasks there (github.com/BeyonderXX/TRACE)"
    need "$RAW/CL_Benchmark" "put O-LoRA's CL_Benchmark there (github.com/cmnfriend/O-LoRA)"
    for file in persona code_qa; do need "$RAW/$file.jsonl" "see scripts/gpu/trajectories.py for its form"; done
    for file in background.txt instructions.jsonl trajectories.jsonl; do
        need "data/$file" "ordinary text; conversations to rehearse; episodes in the canonical form"
    done
    "$BIN/python" scripts/gpu/trajectories.py trace "$RAW/TRACE" data/trace --limit "$LIMIT"
    "$BIN/python" scripts/gpu/trajectories.py standard_cl "$RAW/CL_Benchmark" data/standard_cl --limit "$LIMIT"
    "$BIN/python" scripts/gpu/trajectories.py pairs "$RAW/persona.jsonl" data/persona.jsonl --limit "$LIMIT"
    "$BIN/python" scripts/gpu/trajectories.py questions "$RAW/code_qa.jsonl" data/code_qa.jsonl --limit "$LIMIT"
}

study() {  # STUDY: everything is there? then all of its arms, its table, and the frontier against a free LoRA
    "$BIN/featcl" sweep "$1" --seeds 0 --dry-run
    "$BIN/featcl" sweep "$1" --seeds 0 "${@:2}"
    "$BIN/featcl" table "$1" --rival full_lora --html "results/$(basename "$1")/table.html"
}

#!/bin/sh
# Start a command in the image: versions, GPU and volumes first, then `exec`, so that signals reach the command itself.
set -eu

# Machine and stack in one block; exits 1 with the reason where a run must not start.
python -m wake2vec.environment

refuse() {
    echo "error: $1" >&2
    exit 1
}

# Only the commands that write there; `doctor`, `report --help` and the like must not trip over it.
case "${1:-} ${2:-}" in
"wake2vec train" | "wake2vec fetch")
    for folder in "$WAKE2VEC_RUNS" "$HF_HOME" "$WAKE2VEC_CACHE"; do
        [ -w "$folder" ] || refuse "$folder: user $(id -u):$(id -g) cannot write there, it belongs to \
$(stat -c %u:%g "$folder" 2>/dev/null || echo nobody); mount a volume there, or start as the folder's owner \
(WAKE2VEC_UID and WAKE2VEC_GID in .env), or chown the folder"
    done
    token=${HF_TOKEN_PATH:-}
    if [ -n "$token" ] && [ -e "$token" ] && [ ! -r "$token" ]; then
        refuse "$token: user $(id -u) cannot read it, it belongs to $(stat -c '%u, mode %a' "$token"); chmod 644 \
the token's file, or start as its owner (WAKE2VEC_UID in .env)"
    fi
    ;;
esac

exec "$@"

#!/usr/bin/env bash
# One worker's side of launch_tpu.sh: installs a tree, and runs it detached
#
#   tpu_worker.sh install EXTRAS    makes .venv in this script's tree, once
#   tpu_worker.sh start ARG...      python -m jaxvlm.main ARG..., unless it runs;
#                                   9: another run does
#   tpu_worker.sh status            HOST running | absent | exited CODE TIME
#   tpu_worker.sh follow            the log, until the run ends
#   tpu_worker.sh log HOST          the log's end, on that worker alone
#   tpu_worker.sh stop [SECONDS]    SIGTERM; SIGKILL to what is left after these
#
# A run outlives the connection that started it. All that is known of it lies in
# ~/jaxvlm/run: command, log, pid, stopped (if it was asked to) and, at its end,
# ended. Who runs holds ~/jaxvlm/lock, which no reboot can leave behind.
set -euo pipefail

tree=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
readonly tree home=$HOME/jaxvlm
readonly run=$home/run shown=50

main() {
  mkdir -p "$home"
  case ${1-} in
    install | start | supervise | status | follow | log | stop) "$@" ;;
    *) fail "got '${1-}'; see the head of ${BASH_SOURCE[0]}" ;;
  esac
}

fail() {
  echo "$HOSTNAME: $*" >&2
  exit "${code-1}"
}

install() {
  [[ -e $tree/.venv/installed ]] && return
  # The images of TPUs have Pythons of many ages; uv brings the one for all.
  PATH=$HOME/.local/bin:$PATH
  command -v uv >/dev/null ||
    curl -LsSf https://astral.sh/uv/install.sh | sh -s -- --quiet
  cd "$tree"
  rm -rf .venv
  uv venv --quiet --python 3.11 .venv
  uv pip install --quiet --python .venv/bin/python --editable ".[$1]"
  touch .venv/installed
}

start() {
  local command
  command=$(printf '%q ' "$tree" "$@")
  exec 9>>"$home/lock"
  # Whoever asks for the status has it for a moment.
  if ! flock --timeout 0.5 9; then
    [[ $(<"$run/command") == "$command" ]] ||
      code=9 fail "another run is on: $(<"$run/command"). Stop it with launch_tpu.sh" \
        "--stop, or follow it by giving its own command."
    return 0
  fi
  rm -rf "$run.previous"
  [[ ! -e $run ]] || mv "$run" "$run.previous"
  mkdir "$run"
  ln -s "$tree" "$run/tree"
  echo "$command" >"$run/command"
  cd "$tree"
  # Descriptor 9, and so the lock, lives on in the supervisor alone.
  setsid nohup "${BASH_SOURCE[0]}" supervise "$@" \
    </dev/null >"$run/log" 2>&1 &
  echo $! >"$run/supervisor"
}

supervise() {
  local child code=0
  # A shutdown's signal reaches the run itself; this one waits for what it says.
  trap : TERM HUP INT
  .venv/bin/python -u -m jaxvlm.main "$@" 9>&- &
  child=$!
  echo "$child" >"$run/pid"
  while kill -0 "$child" 2>/dev/null; do
    wait "$child" || true
  done
  wait "$child" || code=$?
  echo "$code $(date +%s.%N)" >"$run/ended.partial"
  mv "$run/ended.partial" "$run/ended"
}

running() {
  ! flock --shared --nonblock "$home/lock" true
}

status() {
  if running; then
    echo "$HOSTNAME running"
  elif [[ -e $run/ended ]]; then
    echo "$HOSTNAME exited $(<"$run/ended")$([[ ! -e $run/stopped ]] || echo ' stopped')"
  else # never started, or the machine went down with it
    echo "$HOSTNAME absent"
  fi
}

follow() {
  [[ -e $run/log ]] || fail "no run here"
  tail -n "$shown" -F "$run/log" 2>/dev/null &
  while [[ ! -e $run/ended ]] && kill -0 "$(<"$run/supervisor")" 2>/dev/null; do
    sleep 0.2
  done
  sleep 0.1 # for what was said last
  kill $!
}

log() {
  [[ $1 != "$HOSTNAME" ]] || tail -n "$shown" "$run/log"
}

stop() {
  local waited=0
  running && [[ -e $run/pid ]] || return 0
  touch "$run/stopped"
  kill -TERM "$(<"$run/pid")"
  [[ -n ${1-} ]] || return 0
  while running && ((waited++ < 10 * $1)); do sleep 0.1; done
  ! running || kill -KILL "$(<"$run/pid")"
}

main "$@"

# shellcheck shell=bash
# Sourced by launch_tpu.sh: asks for pods, sees how they are, reaches workers
#
# Of its options it reads name, zone, project, accelerator, runtime, slices, spot,
# existing, create_flags, connect_flags, poll and dry_run; look sets pod and told.
# shellcheck disable=SC2154

# Runs a command, or prints it for a shell to read.
call() {
  local word line=''
  if [[ ! $dry_run ]]; then
    "$@" 3>&-
    return
  fi
  for word in "$@"; do
    [[ $word =~ ^[-A-Za-z0-9_.,:=/]+$ ]] || word=${word@Q}
    line+="$word "
  done
  printf '%s\n' "$line" >&3 # at once: several may be called side by side
}

# Waits before another look.
pause() {
  [[ $dry_run ]] || sleep "$poll"
}

tpus() {
  local group=$1 verb=$2
  shift 2
  call gcloud compute tpus "$group" "$verb" "$@" \
    "--zone=$zone" ${project:+"--project=$project"}
}

nodes() {
  local i
  ((slices > 1)) || echo "$name"
  ((slices == 1)) || for ((i = 0; i < slices; i++)); do echo "$name-$i"; done
}

# Sets pod to absent, waiting, ready, lost or failed, and told to what gcloud said.
look() {
  local states which=$name
  told=''
  if [[ ! $existing ]]; then
    queue=$(tpus queued-resources list "--filter=name~/$name\$" \
      '--format=value(state.state)') || return 1
    told=$queue
    [[ ! $dry_run ]] || queue=${pod:+ACTIVE}
    case $queue in
      '') pod=absent && return ;;
      ACTIVE) ;;
      FAILED) pod=failed && return ;;
      SUSPEND* | DELETING) pod=lost && return ;;
      *) pod=waiting && return ;;
    esac
  fi
  ((slices == 1)) || which+='-[0-9]+'
  states=$(tpus tpu-vm list "--filter=name~/$which\$" '--format=value(state)') ||
    return 1
  told="${told:+$told, }${states//$'\n'/ }"
  if [[ $dry_run || $(grep -c '^READY$' <<<"$states") == "$slices" ]]; then
    pod=ready
  elif grep -Eq '^(PREEMPTED|TERMINATED|DELETING|STOP|HID)' <<<"$states"; then
    pod=lost
  elif [[ $existing && ! $states ]]; then
    pod=absent
  else
    pod=waiting
  fi
}

# Looks, again if gcloud gives no answer.
look_surely() {
  local tries=0
  until look; do
    ((++tries < silences)) ||
      die "gcloud does not say how $name is. A run that is on goes on without" \
        "this; the same command follows it."
    pause
  done
}

create() {
  local node=("--node-id=$name")
  ((slices == 1)) || node=("--node-count=$slices" "--node-prefix=$name")
  say "requesting $name: $accelerator${spot:+, spot}"
  tpus queued-resources create "$name" "${node[@]}" \
    "--accelerator-type=$accelerator" "--runtime-version=$runtime" \
    ${spot:+--spot} ${create_flags[@]+"${create_flags[@]}"} ||
    die "$name cannot be requested; gcloud says why above."
}

delete() {
  say "deleting $name"
  tpus queued-resources delete "$name" --force --quiet
}

# Waits until the pod is ready, requesting it where it is not there.
obtain() {
  local before='' requested=''
  while true; do
    look_surely
    [[ $told == "$before" ]] || say "$name: ${told:-not there}"
    before=$told
    case $pod in
      ready) return ;;
      absent)
        [[ ! $existing ]] || die "no TPU VM $name in $zone."
        [[ $requested ]] || create
        requested=yes
        [[ ! $dry_run ]] || continue
        ;;
      lost | failed)
        [[ ! $existing ]] || lost_for_good
        if [[ $requested && $pod == failed ]]; then
          tpus queued-resources describe "$name" >&2 || true
          die "the request for $name failed. Delete it with --delete."
        fi
        delete # of an earlier request, or preempted as soon as it was there
        requested=''
        continue
        ;;
      waiting) ;;
    esac
    pause
  done
}

lost_for_good() {
  say "$name is ${told:-gone}, and was not made here. With another TPU, the same command" \
    "takes the run up from its last checkpoint."
  exit 75
}

# -- the workers ---------------------------------------------------------------

# A command on the workers of all slices, side by side.
on_workers() {
  local command=$1 node pids=() pid status=0
  for node in $(nodes); do
    tpus tpu-vm ssh "$node" --worker=all "--command=$command" --quiet \
      ${connect_flags[@]+"${connect_flags[@]}"} </dev/null &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do
    wait "$pid" || status=$?
  done
  return "$status"
}

on_first() {
  tpus tpu-vm ssh "$(nodes | head -n 1)" --worker=0 "--command=$1" --quiet \
    ${connect_flags[@]+"${connect_flags[@]}"} </dev/null
}

worker() {
  printf '%s' "bash ~/jaxvlm/run/tree/tools/tpu_worker.sh $*"
}

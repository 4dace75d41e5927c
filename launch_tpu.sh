#!/usr/bin/env bash
# Runs jaxvlm on a TPU pod: makes it, installs, starts, follows, restarts, ends.
set -euo pipefail
shopt -s inherit_errexit

usage() {
  cat <<'END'
Usage:
  launch_tpu.sh --name=NAME --zone=ZONE --accelerator=TYPE [OPTION]... -- FLAG...
  launch_tpu.sh --name=NAME --zone=ZONE --existing [OPTION]... -- FLAG...
  launch_tpu.sh --name=NAME --zone=ZONE --status | --stop | --delete

Runs `python -m jaxvlm.main FLAG...` on every worker of a Cloud TPU, at the commit
that is checked out here, and shows worker 0's log until the run is finished. A
pod that is preempted is requested again, and the run goes on from its last
checkpoint. The same command follows a run that is on, or takes it up.

Example:
  ./launch_tpu.sh --name=staged --zone=us-east5-b --accelerator=v6e-16 --spot \
    -- --config=configs/staged.py:qwen2_5_vl_7b --config.workdir=gs://mine/staged

The pod:
  --name=NAME           of the queued resource and its TPU
  --zone=ZONE           where
  --project=PROJECT     gcloud's own if left out
  --accelerator=TYPE    v5litepod-16, v5p-128, v6e-16, ...
  --runtime=VERSION     of the TPU's image; known for v4, v5e, v5p and v6e
  --slices=N            so many pods of that type, joined over the network (1)
  --spot                may be preempted, and costs less
  --create-flag=FLAG    one more for `queued-resources create`, as it is; repeat
  --connect-flag=FLAG   one more for `tpu-vm ssh` and `scp`: --internal-ip
  --existing            take the TPU VM of that name; never create or delete it

The run:
  --dirty               install what is in the working tree, not committed too
  --extras=NAMES        of pyproject.toml that are installed (tpu,gcs)
  --max-restarts=N      without a new checkpoint in between (3)
  --poll=SECONDS        between looks at pod and workers (20)
  --cleanup             delete the pod when the run has ended, well or not
  --dry-run             print every command and run none

Instead of a run:
  --status              of the pod and its workers
  --stop                save after the step at hand, and end; the pod stays
  --delete              the queued resource and its TPU, at once

Exits with 0 when the run is finished or was stopped, with the worker's own code
where one failed, 1 where the pod cannot be had or the restarts are used up, 2 for
a mistake in these options, 75 where a TPU that was not made here is preempted.
Ctrl-C leaves pod and run as they are.
END
}

name='' zone='' project='' accelerator='' runtime='' extras=tpu,gcs action=run
slices=1 poll=20 max_restarts=3
spot='' existing='' dirty='' cleanup='' dry_run=''
create_flags=() connect_flags=() run_flags=()
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly root
# What is known of the pod and the run; set by look and watch.
pod='' told='' queue='' outcome='' code=0 failing='' follower='' tree='' rehearsed=''
readonly patience=3 # looks, before an end is believed
readonly silences=10 # looks without an answer, before that is believed

# shellcheck source=tools/tpu_pod.sh
source "$root/tools/tpu_pod.sh"

# -- telling -------------------------------------------------------------------

say() {
  echo "launch_tpu: $*" >&2
}

die() {
  say "$@"
  exit 1
}

refuse() {
  say "$@" "(--help tells more)"
  exit 2
}

# -- options -------------------------------------------------------------------

read_options() {
  while (($#)); do
    case $1 in
      --name=* | --zone=* | --project=* | --accelerator=* | --runtime=* | \
        --slices=* | --extras=* | --poll=*)
        local option=${1%%=*}
        printf -v "${option#--}" %s "${1#*=}"
        ;;
      --max-restarts=*) max_restarts=${1#*=} ;;
      --create-flag=*) create_flags+=("${1#*=}") ;;
      --connect-flag=*) connect_flags+=("${1#*=}") ;;
      --spot | --existing | --dirty | --cleanup) printf -v "${1#--}" yes ;;
      --dry-run) dry_run=yes ;;
      --status | --stop | --delete)
        [[ $action == run || $action == "${1#--}" ]] ||
          refuse "$1: got --$action too; expected one of them"
        action=${1#--}
        ;;
      --help | -h) usage && exit ;;
      --)
        shift
        run_flags=("$@")
        break
        ;;
      --config*) refuse "$1: flags of jaxvlm come after --" ;;
      *) refuse "$1: no such option; options are --NAME or --NAME=VALUE" ;;
    esac
    shift
  done
  check_options
}

check_options() {
  [[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] ||
    refuse "--name: got '$name'; expected a-z, 0-9 and -, a letter first"
  [[ $zone ]] || refuse "--zone: expected the TPU's, as --zone=us-east5-b"
  [[ $slices =~ ^[1-9][0-9]*$ ]] || refuse "--slices: got '$slices'"
  [[ $max_restarts =~ ^(0|[1-9][0-9]*)$ ]] ||
    refuse "--max-restarts: got '$max_restarts'; expected a whole number, as 3"
  [[ $poll =~ ^[0-9]*\.?[0-9]+$ ]] || refuse "--poll: got '$poll'; in seconds"
  [[ ! $existing || ! $accelerator$spot$cleanup ]] ||
    refuse "--existing takes a TPU as it is: no --accelerator, --spot, --cleanup"
  if [[ $action != run ]]; then
    ((${#run_flags[@]} == 0)) || refuse "--$action takes no flags of a run"
    [[ $action != delete || ! $existing ]] ||
      refuse "--delete: a TPU that was not made here is not deleted here"
    return
  fi
  [[ " ${run_flags[*]}" == *' --config='* ]] ||
    refuse "no run: expected jaxvlm's flags after --, --config=FILE among them"
  [[ $existing || $accelerator ]] ||
    refuse "--accelerator: expected a TPU's type, as v6e-16, or --existing"
  [[ $existing || $runtime ]] || runtime=$(usual_runtime)
  check_workdir
}

usual_runtime() {
  case $accelerator in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5e-*) refuse "--accelerator: gcloud calls $accelerator v5litepod-${accelerator#*-}" ;;
    *) refuse "--runtime: none is known for '$accelerator'; give its version" ;;
  esac
}

# The value of one of the run's flags; the last that is given counts.
given() {
  local flag
  for flag in "${run_flags[@]}"; do
    [[ $flag != "--$1="* ]] || echo "${flag#*=}"
  done | tail -n 1
}

# The run's workdir without slashes that name nothing: in a bucket a//b is not a/b.
workdir() {
  given config.workdir | sed -E 's|/+|/|g; s|/$||; s|^gs:/|gs://|'
}

check_workdir() {
  local where
  where=$(workdir)
  [[ $where != gs://* ]] || return 0
  # Any other would lie in the installed tree, and with the next commit elsewhere.
  [[ $where == /* ]] ||
    refuse "--config.workdir: got '$(given config.workdir)'; expected" \
      "--config.workdir=gs://BUCKET/DIRECTORY after --, or an absolute path"
  if [[ $existing ]]; then
    say "the workdir '$where' is not on gs://: it is lost with this TPU's disks," \
      "and a pod's hosts do not share one."
  elif ((max_restarts)); then
    refuse "the workdir '$where' goes with the pod's disks when it is preempted;" \
      "expected --config.workdir=gs://BUCKET/DIRECTORY after --, or" \
      "--max-restarts=0 for a run that may be lost"
  fi
}

# -- installing ---------------------------------------------------------------

# The commit, or with --dirty the working tree, as a tree of git's.
snapshot() {
  local changes
  changes=$(git -C "$root" status --porcelain)
  if [[ $changes && ! $dirty ]]; then
    say "the working tree is not what is committed:"
    head -n 10 <<<"$changes" >&2
    refuse "commit that, or give --dirty to install it as it is"
  fi
  # An index of its own, so that the user's is left alone.
  GIT_INDEX_FILE=$scratch/index git -C "$root" read-tree HEAD
  GIT_INDEX_FILE=$scratch/index git -C "$root" add --all
  GIT_INDEX_FILE=$scratch/index git -C "$root" write-tree | cut -c -12
}

check_config() {
  local file
  file=$(given config)
  file=${file%%:*}
  [[ $(git -C "$root" cat-file -t "$tree:$file" 2>/dev/null || true) == blob ]] ||
    refuse "--config: got '$file', which is no file of the tree that is installed;" \
      "expected one that git tracks, as configs/staged.py"
}

install() {
  local archive=$scratch/jaxvlm-$tree.tar.gz node unpack
  call git -C "$root" archive --format=tar.gz "--output=$archive" "$tree" ||
    return
  for node in $(nodes); do
    tpus tpu-vm scp "$archive" "$node:" --worker=all --quiet \
      ${connect_flags[@]+"${connect_flags[@]}"} </dev/null || return
  done
  unpack="mkdir -p ~/jaxvlm/$tree && tar -xzf ~/jaxvlm-$tree.tar.gz -C"
  unpack+=" ~/jaxvlm/$tree && rm ~/jaxvlm-$tree.tar.gz"
  on_workers "$unpack && bash ~/jaxvlm/$tree/tools/tpu_worker.sh install $extras"
}

start() {
  local flags
  printf -v flags '%q ' "${run_flags[@]}"
  on_workers "bash ~/jaxvlm/$tree/tools/tpu_worker.sh start $flags"
}

# -- the run -------------------------------------------------------------------

# Whether the run has left its last file.
finished() {
  local where
  where=$(workdir)
  if [[ $where == gs://* ]]; then
    call gcloud storage ls "$where/hf/config.json" >/dev/null 2>&1
  else
    on_first "test -e $(printf '%q' "$where")/hf/config.json" >/dev/null 2>&1
  fi
}

# The step of the newest whole checkpoint on gs://, or -1.
newest() {
  local where found=''
  where=$(workdir)
  [[ $where != gs://* ]] ||
    found=$(call gcloud storage ls "$where/checkpoints/*/seal.json" 2>/dev/null |
      sed -nE 's|.*/([0-9]+)/seal\.json$|\1|p' | sort -n | tail -n 1) || true
  echo "${found:--1}"
}

follow() {
  set -m # a process group of its own, to be ended whole
  on_first "$(worker follow)" &
  follower=$!
  set +m
}

# Ends the following of a log; after so many seconds, if it ends by itself.
unfollow() {
  local tenths=$((10 * ${1-0}))
  [[ $follower ]] || return 0
  while ((tenths-- > 0)) && kill -0 "$follower" 2>/dev/null; do sleep 0.1; done
  kill -TERM -- "-$follower" 2>/dev/null || true
  wait "$follower" 2>/dev/null || true
  follower=''
}

# Sets outcome to finished, stopped, failed, interrupted (ended well, unfinished)
# or lost, and code to that of the worker that failed first.
watch() {
  local statuses silent=0 ended=0
  while true; do
    pause
    look_surely
    [[ $pod != lost && $pod != absent && $pod != failed ]] || break
    [[ $pod == ready ]] || continue # under repair
    if ! statuses=$(on_workers "$(worker status)" 2>/dev/null); then
      ((++silent < silences)) && continue
      die "the workers of $name cannot be reached though it is $told. Their run" \
        "may go on; the same command follows it."
    fi
    silent=0
    judge "$statuses"
    [[ $outcome != running ]] || continue
    # A preemption ends the workers before the pod says so.
    ((++ended >= patience)) || [[ $outcome =~ ^(finished|stopped)$ ]] || continue
    return
  done
  outcome=lost
}

judge() {
  local first
  first=$(awk '$2 == "exited" && $3 { print $4, $3, $1 }' <<<"$1" | sort -n | head -n 1)
  if [[ $first ]]; then
    read -r _ code failing <<<"$first"
    outcome=failed
  elif grep -q ' running' <<<"$1"; then
    outcome=running
  elif grep -q ' absent' <<<"$1"; then
    outcome=interrupted
  elif finished; then
    outcome=finished
  elif grep -q ' stopped' <<<"$1"; then
    outcome=stopped
  else
    outcome=interrupted
  fi
}

# One life of the pod: sets outcome.
attempt() {
  local looks=0 status=0
  obtain
  { install && start; } || status=$?
  if ((status == 0)); then
    follow
    watch
    case $outcome in
      lost) unfollow ;;
      failed) ;; # worker 0 may still run
      *) unfollow 10 ;;
    esac
    return
  fi
  outcome=lost
  ((status != 9)) || die "$name is taken; its workers say by what above."
  while ((looks++ < patience)); do # a preemption too may be why
    look_surely
    [[ $pod == ready ]] || return 0
    pause
  done
  die "the run cannot be started on $name; its workers say why above."
}

run() {
  local restarts=0 last step
  tree=$(snapshot)
  check_config
  last=$(newest)
  while true; do
    attempt
    [[ ! $dry_run ]] || rehearse
    case $outcome in
      finished) end 0 "finished; its results are in $(workdir)" ;;
      stopped) end 0 "stopped as asked; the same command takes the run up" ;;
      failed) fail ;;
    esac
    [[ ! $existing || $outcome != lost ]] || lost_for_good
    step=$(newest)
    ((step <= last)) && ((++restarts)) || restarts=0
    last=$step
    ((restarts <= max_restarts)) ||
      end 1 "gone for the $restarts. time without a new checkpoint; giving up"
    say "$name: $told. The run ended early and is taken up" \
      "$( ((step < 0)) && echo 'from its start' || echo "after step $step")."
  done
}

fail() {
  say "$failing failed with code $code; its log ends with"
  on_workers "$(worker log "$failing")" >&2 || true
  say "stopping the others"
  on_workers "$(worker stop 10)" || true
  unfollow 10
  end "$code" "failed; mend it, and the same command takes the run up"
}

# In a dry run, the first life of the pod ends with a preemption.
rehearse() {
  [[ ! $existing && $rehearsed != yes ]] || return 0
  say "were it preempted now, this would follow:"
  rehearsed=yes outcome=lost told=PREEMPTED
  delete
  pod=''
}

# The last word on a run: CODE WORD...
end() {
  local status=$1
  shift
  say "${dry_run:+nothing was run; a run would end with: }$*."
  if [[ $cleanup ]]; then
    delete
  elif [[ $dry_run ]]; then
    say "the pod would be left there; launch_tpu.sh $(whose) --delete deletes it."
  elif [[ ! $existing ]]; then
    say "$name is still there, and paid for; this deletes it:" \
      "launch_tpu.sh $(whose) --delete"
  fi
  exit "$status"
}

whose() {
  echo "--name=$name --zone=$zone${project:+ --project=$project}"
}

act() {
  case $action in
    run) run ;;
    delete) delete ;;
    status)
      look_surely
      say "$name: ${told:-not there}"
      [[ $pod != ready ]] || on_workers "$(worker status)"
      ;;
    stop) on_workers "$(worker stop)" ;;
  esac
}

leave() {
  trap '' INT TERM
  unfollow
  say "left $name and its run as they are. The same command follows it again;" \
    "launch_tpu.sh $(whose) --status, --stop or --delete asks, ends, deletes."
  exit "$1"
}

read_options "$@"
[[ $dry_run ]] || command -v gcloud >/dev/null ||
  die "gcloud is not on PATH; install the Google Cloud CLI, and log in"
exec 3>&1
scratch=$(mktemp -d)
readonly scratch
trap 'unfollow; rm -rf "$scratch"' EXIT
trap 'leave 130' INT
trap 'leave 143' TERM
act

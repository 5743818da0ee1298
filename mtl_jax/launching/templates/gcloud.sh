#!/usr/bin/env bash
# Written by mtl-jax launch. Trains on a TPU VM, or a slice of several, of Google Cloud; started here by `bash FILE`.
#
# Makes the TPU VM where it is not there, copies this folder to all its hosts, and runs the same command on each.
# Where a host ends with 75 ("start me again") or 137 (killed from outside) and none with 2 (bad input), all start again; a TPU VM
# that was preempted is made anew. SIGTERM or Ctrl-C here stops the hosts, which save their state.

tpu={{tpu}}
where=(--zone={{zone}})
where+=(--project={{project}})
make=(--accelerator-type={{type}} --version={{version}})
make+=(--spot)                    # {{spot}}
folder={{folder}}                 # on the hosts, below the home directory
restarts={{restarts}}
start={{start}}
stop={{stop}}

vm() { gcloud compute tpus tpu-vm "$1" "$tpu" "${where[@]}" "${@:2}"; }
on_all() { vm ssh --worker=all --command="$1"; }

ready() { # makes the TPU VM, unless it is there
  local state
  state=$(vm describe --format='value(state)' 2> /dev/null)
  if [ "$state" = READY ]; then return 0; fi
  if [ "$state" ]; then vm delete --quiet || return; fi
  vm create "${make[@]}"
}

copy() { # this folder, without what is large or not needed
  local archive
  archive=$(mktemp -t launch.XXXXXX) || return
  tar -czf "$archive" --exclude=./.git --exclude=./.venv --exclude=./runs --exclude=__pycache__ . &&
    gcloud compute tpus tpu-vm scp "$archive" "$tpu:launch.tar.gz" "${where[@]}" --worker=all &&
    on_all "mkdir -p $folder && tar -xzf launch.tar.gz -C $folder"
  local code=$?
  rm -f "$archive"
  return "$code"
}

stopped=
trap 'stopped=yes; on_all "$stop" > /dev/null 2>&1 &' INT TERM HUP

log=$(mktemp -t launch.XXXXXX) || exit 1
trap 'rm -f "$log"' EXIT
restart=0
copied=
while :; do
  if [ "$(vm describe --format='value(state)' 2> /dev/null)" != READY ]; then copied=; fi
  if [ ! "$copied" ]; then
    ready && copy || { echo "launch: the TPU VM $tpu could not be made ready" >&2; exit 1; }
    copied=yes
  fi
  on_all "$start" 2>&1 | tee "$log" &
  wait $!
  while kill -0 $! 2> /dev/null; do wait $!; done # a signal ends `wait` before the hosts' end

  # Each host's last line has its code: what gcloud itself returns depends on its version.
  codes=" $(sed -n 's/^.*launch: this host ended with code \([0-9][0-9]*\).*$/\1/p' "$log" | tr '\n' ' ')"
  case $codes in
    *" 2 "*) code=2 ;;
    *" 75 "* | *" 137 "*) code=75 ;;
    *[1-9]*) code=1 ;;
    " ") code=75 ;; # no host could say so: the TPU VM is gone, or cannot be reached
    *) code=0 ;;
  esac
  if [ "$code" != 75 ] || [ "$stopped" ]; then break; fi
  if [ "$restart" -ge "$restarts" ]; then
    echo "launch: started again $restarts times; not once more" >&2
    break
  fi
  restart=$((restart + 1))
  echo "launch: starting again, $restart of at most $restarts" >&2
  sleep {{pause}}
done
echo "launch: the TPU VM $tpu is still there, and is paid for; delete it: gcloud compute tpus tpu-vm delete $tpu ${where[*]}" >&2
exit "$code"

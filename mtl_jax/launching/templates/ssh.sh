#!/usr/bin/env bash
# Written by mtl-jax launch. Trains on several hosts by ssh: the same command on each, started here by `bash FILE`.
#
# Exit codes of a host: 0 done, 2 bad input, 75 "start me again" (stopped, the state is saved), 137 killed from outside.
# Where a host ends with 75 or 137 and none with 2, all are started again. SIGTERM or Ctrl-C here stops the hosts, which save.

hosts=({{hosts}})
port={{port}}                     # of the first host: free, and reachable from the others
restarts={{restarts}}
job={{name}}
start={{start}}                   # a host's command; "$@" are the words that it gets below

# The words "bash -c SCRIPT NAME ARGUMENTS", quoted for whatever shell the user has on the host.
on_host() {
  local host=$1
  shift
  ssh -o BatchMode=yes -o ServerAliveInterval=15 -o ServerAliveCountMax=4 "$host" "$(printf '%q ' bash -c "$@")" < /dev/null
}

pid_file() { printf '/tmp/mtl_jax-%s-%s.pid' "$job" "$1"; }

stopped=
interrupted=
stop() {
  stopped=yes interrupted=yes
  local index
  for index in "${!hosts[@]}"; do
    on_host "${hosts[index]}" 'kill -TERM "$(cat "$1")"' stop "$(pid_file "$index")" 2> /dev/null &
  done
}
trap stop INT TERM HUP

first=${hosts[0]}
address=${first##*@}:$port
restart=0
while :; do
  processes=()
  for index in "${!hosts[@]}"; do
    together=()
    if [ "${#hosts[@]}" -gt 1 ]; then together=(--distributed "$address,$index,${#hosts[@]}"); fi
    on_host "${hosts[index]}" "$start" "$job" "$(pid_file "$index")" "${together[@]}" &
    processes+=($!)
  done

  code=0 again= refused=
  for index in "${!hosts[@]}"; do
    interrupted=yes
    while [ "$interrupted" ]; do # a signal ends `wait` before the host's end
      interrupted=
      wait "${processes[index]}"
      ended=$?
    done
    case $ended in
      0) ;;
      2) refused=yes code=2 ;;
      75 | 137) again=yes code=75 ;;
      *) [ "$again$refused" ] || code=$ended ;;
    esac
    [ "$ended" = 0 ] || echo "launch: ${hosts[index]} ended with code $ended" >&2
  done
  if [ "$refused" ]; then exit 2; fi
  if [ "$stopped" ] || [ ! "$again" ]; then exit "$code"; fi
  if [ "$restart" -ge "$restarts" ]; then
    echo "launch: started again $restarts times; not once more" >&2
    exit "$code"
  fi
  restart=$((restart + 1))
  echo "launch: starting again, $restart of at most $restarts" >&2
done

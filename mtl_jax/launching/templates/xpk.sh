#!/usr/bin/env bash
# Written by mtl-jax launch. Trains on TPUs of a GKE cluster by xpk; started here by `bash FILE`.
#
# xpk copies this folder into an image and calls this file on every host, as `bash FILE host`. The workload is started again after
# code 75 ("start me again"), after 137 (killed from outside) and when a host is lost, {{restarts}} times at most.

if [ "${1-}" = host ]; then
  { {{first}}; } || exit 2
  exec {{command}} --distributed auto
fi

arguments=(--workload={{name}} --cluster={{cluster}})
arguments+=(--tpu-type={{type}} --num-slices={{slices}})
arguments+=(--project={{project}})
arguments+=(--zone={{zone}})
arguments+=(--base-docker-image={{image}})
arguments+=(--storage={{storage}})
arguments+=(--script-dir=. --max-restarts={{restarts}} --restart-on-exit-codes=75)
arguments+=(--termination-grace-period-seconds={{notice}}) # for the checkpoint that SIGTERM asks for
exec xpk workload create "${arguments[@]}" --command "exec bash {{file}} host" "$@"

#!/bin/bash
# One dataset on several nodes: the run and a scheduler on the first node, one worker process per core of every node.
# Submit from the folder that has .venv: sbatch configs/slurm/many_nodes.sh CONFIG [key=value ...]
#SBATCH --job-name=stem-dask
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=64G
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append

source .venv/bin/activate || exit 1

# the TLS keys of this job, in a private folder visible to all nodes: without TLS every user could run code
own=$HOME/.stem_dask-$SLURM_CLUSTER_NAME
for old in "$own"-*; do # left by killed jobs, which SLURM does not list any more
    number=${old#"$own-"}
    number=${number%-*}
    state=$(squeue --noheader --format=%T --jobs="$number" 2>&1)
    if [ "$number" = "$SLURM_JOB_ID" ] || [ -z "$state" ] || [[ $state == *"Invalid job id"* ]]; then rm -rf "$old"; fi
done
folder=$(mktemp -d "$own-$SLURM_JOB_ID-XXXXXX")
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$folder"' EXIT
keys=$(stem-dask keys "$folder") || exit 1
eval "$keys"

# as for the workers a run starts itself (stem_dask/cluster/local.py): tasks keep no results, so there is nothing to spill, and a
# paused worker might wait forever
export DASK_DISTRIBUTED__WORKER__MEMORY__TARGET=False DASK_DISTRIBUTED__WORKER__MEMORY__SPILL=False
export DASK_DISTRIBUTED__WORKER__MEMORY__PAUSE=False DASK_DISTRIBUTED__WORKER__MEMORY__TERMINATE=0.98
export DASK_DISTRIBUTED__WORKER__PROFILE__INTERVAL=100ms DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL=60s
export DASK_DISTRIBUTED__ADMIN__LOW_LEVEL_LOG_LENGTH=20 DASK_DISTRIBUTED__ADMIN__TICK__INTERVAL=200ms
export DASK_DISTRIBUTED__ADMIN__LARGE_GRAPH_WARNING_THRESHOLD=1GB
# one thread per library and worker
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 NUMEXPR_NUM_THREADS=1 VECLIB_MAXIMUM_THREADS=1
export NUMBA_NUM_THREADS=1 BLOSC_NTHREADS=1

# workers that SLURM killed, for lack of memory perhaps, do not return: do not wait for the wall time
export DASK_DISTRIBUTED__SCHEDULER__NO_WORKERS_TIMEOUT=300s

# MiB per node, from --mem or --mem-per-cpu; the whole node with --mem=0
mem=${SLURM_MEM_PER_NODE:-$((${SLURM_MEM_PER_CPU:-0} * SLURM_CPUS_ON_NODE))}
[ "$mem" -gt 0 ] || mem=$(free -m | awk '/^Mem/ {print $2}')

log=stem-dask-cluster-$SLURM_JOB_ID.log
dask scheduler --protocol tls --port 0 --dashboard-address 127.0.0.1:8787 --scheduler-file "$folder/scheduler.json" \
    >> "$log" 2>&1 &
until [ -s "$folder/scheduler.json" ]; do
    kill -0 $! || exit 1
    sleep 1
done
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" dask worker --scheduler-file "$folder/scheduler.json" \
    --nworkers "$SLURM_CPUS_PER_TASK" --nthreads 1 --no-dashboard --local-directory "${SLURM_TMPDIR:-${TMPDIR:-/tmp}}" \
    --memory-limit "$((mem * 8 / 10 / SLURM_CPUS_PER_TASK))MiB" >> "$log" 2>&1 &
job=("$@" cluster.kind=auto "cluster.scheduler_file=$folder/scheduler.json")

# SLURM signals this shell before the wall time. The run stops in order (exit code 75), and the task goes back into the
# queue, where the same command goes on; the same when a node fails (--requeue).
stem-dask run "${job[@]}" &
run=$!
trap 'kill -TERM "$run"' TERM
wait "$run"; code=$?
while kill -0 "$run" 2>/dev/null; do wait "$run"; code=$?; done
if [ "$code" = 75 ] || [ "$code" = 143 ]; then
    # not the job's own number: one task has that of the whole array
    task=$SLURM_JOB_ID
    [ -z "$SLURM_ARRAY_JOB_ID" ] || task=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    for _ in 1 2 3; do # a busy SLURM does not answer at once
        state=$(squeue --noheader --format=%T --jobs="$task") || { sleep 5; continue; }
        [ "$state" = RUNNING ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 100 ] || break
        scontrol requeue "$task" && break
        sleep 5
    done
fi
if [ "$code" = 137 ]; then
    echo "error: the run was killed, most likely because it ran out of memory; it is not requeued." \
        "With more memory (sbatch --mem) or fewer workers (cluster.n_workers) the same command goes on" >&2
fi
exit "$code"

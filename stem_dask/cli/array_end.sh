
# SLURM signals this shell before the wall time. The run stops in order (exit code 75), and the task goes back into the
# queue, where the same command goes on; the same when a node fails (--requeue).
{command} "${job[@]}" &
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

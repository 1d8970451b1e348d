# What every job of this folder does. A script sets what there is to know of its stage, and reads this in; a script that
# `nemotron` submits holds it. `stage` is its name; `notebook` what is executed, or `command` what is run where there is none;
# `resumes` says whether it can be asked to stop, and go on later; `sized` whether its run has the nodes of the job.
set -uo pipefail

say() { echo "$stage.sbatch: $*" >&2; }

# Signals first: Slurm may send one at any moment. The training is asked to stop by a file, again and again, since a run that
# is just beginning takes old ones away. Before the first step there is nothing to save, and all is ended at once.
run='' pid='' asked='' again='' ended='' interrupted=''
keep_asking() { while kill -0 "$pid"; do touch "$run/STOP"; sleep 2; done 2>/dev/null; }
on_signal() {
    asked=1 interrupted=1
    say "Slurm asks to stop: the training writes a checkpoint"
    if [ -e "$run/metrics.jsonl" ]; then keep_asking & else again=1 && kill -TERM "$pid" 2>/dev/null; fi
}
on_term() {
    interrupted=1
    ended="job $SLURM_JOB_ID was ended by SIGTERM: cancelled, preempted, or out of time"
    kill -TERM "$pid" 2>/dev/null
}
trap on_signal USR1
trap on_term TERM
[ -n "$resumes" ] || trap '' USR1 # what cannot go on later is not asked to stop

root=${NEMOTRON_ROOT:-$SLURM_SUBMIT_DIR}
export PATH="${NEMOTRON_BIN:-$root/.venv/bin}:$PATH" PYTHONUNBUFFERED=1 TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}
case $notebook in '' | /*) ;; *) notebook=$root/$notebook ;; esac
[ -f "${notebook:-$root/slurm/body.sh}" ] || { say "$root is no checkout; submit from the checkout, or set NEMOTRON_ROOT"; exit 2; }
[ $# -ge 2 ] || { say "usage: sbatch slurm/$stage.sbatch FAMILY CONFIG [KEY=VALUE ...]"; exit 2; }
family=$1 config=$2
shift 2
attempt="attempt $((${SLURM_RESTART_COUNT:-0} + 1)) of job $SLURM_JOB_ID on $SLURM_JOB_NODELIST"
if [ -z "$notebook" ]; then # and so no run folder
    say "$attempt"
    exec nemotron "$family" $command -c "$config" "$@"
fi

# The run folder is given by the command line. By hand it is named here, and the job's size is that of the run; a job that was
# queued again finds the name it had.
run=${NEMOTRON_RUN_DIR:-}
if [ -z "$run" ]; then
    runs=$PWD/output/$family/$stage
    run=$(find "$runs" -maxdepth 1 -name "*-job$SLURM_JOB_ID*" 2>/dev/null | sed 's|/\.\([^/]*\)\.partial\.ipynb$|/\1|' | sort | tail -n 1)
    if [ -z "$run" ] || [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then
        name=$(basename "$config" .yaml | tr -c 'A-Za-z0-9\n' -)
        run=$runs/$(date -u +%Y%m%dT%H%M%SZ)-$name-job$SLURM_JOB_ID
    fi
    [ -z "$sized" ] || set -- "run.nodes=$SLURM_JOB_NUM_NODES" "run.nproc_per_node=${NEMOTRON_RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}" "$@"
fi
mkdir -p "$(dirname "$run")" || exit 1

# While it runs, the executed notebook is written beside the run folder. Earlier attempts keep theirs, numbered.
partial=$(dirname "$run")/.$(basename "$run").partial.ipynb
keep_notebook() {
    [ -d "$run" ] && [ -f "$partial" ] || return 0
    local n=1
    while [ -e "$run/notebook.$n.ipynb" ]; do n=$((n + 1)); done
    [ ! -e "$run/notebook.ipynb" ] || mv "$run/notebook.ipynb" "$run/notebook.$n.ipynb"
    mv "$partial" "$run/notebook.ipynb"
}
keep_notebook

# Run a command and wait for it. A signal interrupts the waiting, not the command.
run_and_wait() {
    "$@" &
    pid=$! interrupted=1
    while [ -n "$interrupted" ]; do
        interrupted=''
        wait "$pid"
        code=$?
    done
}

code=0
parameters=$(python -m nemotron_nb.ops.slurm parameters "$family" "$config" "$run" "$PWD" "$@") || exit 1
say "run folder $run, $attempt"
if [ -z "$again$ended" ]; then
    run_and_wait papermill "$notebook" "$partial" -k python3 -y "$parameters" --cwd "$PWD" \
        --no-log-output --stdout-file - --stderr-file - --log-level ERROR --no-progress-bar --request-save-on-cell-execute --autosave-cell-every 5
    keep_notebook
fi
if [ "$code" != 0 ] && [ -z "$again$ended" ] && [ -d "$run" ]; then # a notebook may die; its training goes on
    died=$code
    run_and_wait python -m nemotron_nb.ops.slurm wait "$run"
    code=$died
fi
trap '' USR1

# What became of it: done, paused to go on later, or failed.
state=$(sed -n 's/^  "state": "\([a-z]*\)".*/\1/p' "$run/status.json" 2>/dev/null)
if [ "$state" = done ] && [ -z "$ended" ]; then exit "$code"; fi
if [ "$state" = preempted ] && [ -z "$asked" ]; then exit 0; fi # stopped by hand
if [ "$state" = preempted ] && ! python -m nemotron_nb.ops.slurm progressed "$run"; then
    ended="no step was trained between two stops: the time limit is too short for this training"
elif [ "$state" = preempted ] || [ -n "$again" ]; then
    say "queued again, to go on"
    trap '' TERM
    scontrol requeue "$SLURM_JOB_ID" && exit 0
    say "Slurm does not queue this job again; submit it with NEMOTRON_RUN_DIR=$run to go on"
    exit 1
fi
[ "$code" != 0 ] || code=1
python -m nemotron_nb.ops.slurm failed "$run" "${ended:-the notebook ended with exit code $code}"
say "failed; the notebook is $([ -d "$run" ] && echo "$run/notebook.ipynb" || echo "$partial")"
exit "$code"

"""A run notebook without a model: it counts steps, keeps its place in a file, and stops when it is asked to. What the job script does with it is what is tested."""

import nbformat

PARAMETERS = 'family = ""\nconfig = ""\noverrides = []\nrun_dir = ""\nwork_dir = ""'
COUNT = """
import json, os, socket, subprocess, sys, time
from pathlib import Path
from nemotron_nb.core import write_json
from nemotron_nb.ops.run_folder import begin_attempt, set_status

folder, said = Path(run_dir), dict(o.split("=", 1) for o in overrides)
print("preparing", flush=True)
time.sleep(float(said.get("prepare", 0)))
if not folder.is_dir():
    folder.mkdir()
    set_status(folder, "queued")
begin_attempt(folder)
write_json(folder / f"given-{os.environ.get('SLURM_RESTART_COUNT', 0)}.json", {"family": family, "config": config, "overrides": overrides, "work_dir": work_dir})

def write(**line):
    with open(folder / "metrics.jsonl", "a") as f: f.write(json.dumps(line) + "\\n")

def trained():
    lines = (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else []
    return sum(json.loads(line)["kind"] == "train" for line in lines)

if "die" in said:  # the kernel is gone, a training that it started is not
    trains = "import sys, time; from pathlib import Path; time.sleep(15); Path(sys.argv[1]).with_name('trained').touch()"
    child = subprocess.Popen([sys.executable, "-c", trains, str(folder / "train.yaml")], start_new_session=True)
    write_json(folder / "train.json", {"pid": child.pid, "host": socket.gethostname()})
    os.kill(os.getpid(), 9)

paused = False
for step in range(trained() + 1, int(said.get("steps", 5)) + 1):
    write(kind="train", step=step)
    if step == int(said.get("fail", 0)): raise RuntimeError("the loss is not a number")
    print("step", step, flush=True)
    time.sleep(float(said.get("pause", 0)))
    paused = (folder / "STOP").exists()
    if paused: break
if paused: write(kind="paused", step=trained() if "stuck" not in said else 0)
"""
END = 'set_status(folder, "preempted" if paused else said.get("end", "done"))'


def checkout(folder):
    """A folder that looks like a checkout to the job script."""
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}})
    notebook.cells = [nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(COUNT), nbformat.v4.new_code_cell(END)]
    (folder / "nbs" / "runs").mkdir(parents=True)
    nbformat.write(notebook, folder / "nbs" / "runs" / "sft.ipynb")
    return folder

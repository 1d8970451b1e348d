"""What does each step of `make recipe` buy, over several seeds?

    python benchmarks/recipe.py [--seeds 0 1 2] [--output FOLDER] [--json benchmarks/recipe_tiny.json]

Does `nemotron nano3 recipe -c tiny` once a seed, each into a folder of its own, and prints every measure of every step with its mean
over the seeds. A seed is that of the random start of the base model, of the order of documents and chats, of the answers that
are drawn, and of the pairs. Tasks and held-out data are the same. A folder that has a journal goes on. --json writes what the
lesson nbs/stages/15_recipe.ipynb shows.
"""

import argparse
import json
import os
import statistics
from collections import defaultdict
from pathlib import Path

from nemotron_nb.core import write_json
from nemotron_nb.ops.config import project_root
from nemotron_nb.stages.recipe import card_of, recipe_run
from nemotron_nb.viz import table

SEEDED = {
    "pretrain": ("train.seed",),
    "sft": ("train.seed",),
    "dpo": ("grpo.seed", "dpo.seed"),
    "rl": ("grpo.seed",),
}


def measured(seed, output):
    """Rows of one seed: step, measure, before, after, verdict; and seconds of each step."""
    typed = [f"{step}.{name}={seed}" for step, names in SEEDED.items() for name in names]
    page = recipe_run("nano3", "tiny", typed, name=f"seed-{seed}", output_root=str(output / f"seed-{seed}"))
    steps = card_of(page.parent)["steps"]
    kept = ("name", "before", "after", "better", "verdict")
    rows = [{"seed": seed, "step": s["step"], **{k: m[k] for k in kept}} for s in steps for m in s["measures"]]
    return rows, {s["step"]: s["seconds"] for s in steps}


def summary(rows):
    """One row for each measure: mean before and after, the spread of the change, and how often it was a gain."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["step"], row["name"]].append(row)
    found = []
    for (step, name), group in groups.items():
        mean = {k: statistics.fmean(v) if len(v := [r[k] for r in group if r[k] is not None]) else None for k in ("before", "after")}
        verdicts = [r["verdict"] for r in group]
        found.append({"step": step, "measure": name, **{k: v if v is None else round(v, 3) for k, v in mean.items()},
                      **{word: verdicts.count(word) for word in ("better", "no change", "worse")}})
    return found


def main(seeds, output, path):
    """Do the recipes, print, and write."""
    rows, seconds = [], {}
    for seed in seeds:
        new, seconds[seed] = measured(seed, output)
        rows += new
    found = summary(rows)
    print(table(found))
    if path:
        command = f"python benchmarks/recipe.py --seeds {' '.join(map(str, seeds))}"
        write_json(path, {"command": command, "seeds": seeds, "measures": found})
    print(f"seconds by seed: {seconds}; load {os.getloadavg()[0]:.1f}")
    print(json.dumps(rows[:1]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=project_root() / "output" / "benchmark_recipe")
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    main(given.seeds, given.output, given.json)

"""The notebooks as files: each asks one question, no cell stands twice, and none is too heavy to open."""

import ast
import json
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_asks_one_question_once(path):
    cells = json.loads(path.read_text())["cells"]
    sources = ["".join(c["source"]) for c in cells]
    title, *lines = [line for line in sources[0].splitlines() if line.strip()]
    assert title.startswith("# ") and (path.stem == "index" or path.parent.name == "runs" or lines[0].startswith("> ") and lines[0].endswith("?"))
    long = [s for s in sources if len(s) > 60]
    assert len(long) == len(set(long)), "a cell stands twice"
    assert path.stat().st_size < 400_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=str)
def test_stored_pictures_have_words(path):
    """A code host and a screen reader find the alternative text in the metadata of the output."""
    for cell in json.loads((ROOT / path).read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                assert output["metadata"].get("image/png", {}).get("alt", "").strip(), "".join(cell["source"])[:80]


# A notebook whose cells are a lesson -> the lines of an export cell in the median. A new one is added, none is taken out.
LESSONS = {
    "00_core": 11, "01_viz": 9, "02_rehearsal": 15, "03_connection": 15, "04_usage": 13, "05_endpoint": 13,
    "90_cli": 9, "92_api": 10,
    "data/01_files": 11, "data/02_levels": 13, "data/03_records": 10, "data/04_sample": 13, "data/05_tokenizer": 12,
    "data/06_encoder": 8, "data/07_template": 12, "data/08_mask": 12, "data/09_sandbox": 11,
    "data/10_jinja_template": 10, "data/11_nvidia_prep": 9, "data/12_reasoning": 12, "data/13_filters": 12,
    "data/14_judge": 13, "data/15_blend": 10, "data/16_sources": 13, "data/17_pack": 11, "data/18_pack_fast": 16,
    "data/19_shards": 9, "data/20_tokenized": 12, "data/21_manifest": 15, "data/22_prep": 11, "data/23_inspect": 17,
    "data/24_duplicates": 12, "data/25_contamination": 6, "data/26_language": 8, "data/27_personal": 8,
    "data/28_quality": 4, "data/29_clean": 19,
    "loss/00_precision": 3, "loss/01_schedule": 11, "loss/02_two_stage": 13, "loss/03_fused": 10,
    "loss/04_kernel": 14, "loss/05_mtp": 14, "loss/07_occupancy": 10, "loss/08_compiled": 19, "loss/09_bound": 16,
    "loss/10_rules": 14, "loss/11_policy": 10,
    "generate/01_verify": 9, "generate/02_turns": 11, "generate/03_decoding": 19, "generate/04_sampling": 20,
    "generate/05_synthesise": 11, "generate/06_served": 9,
    "pretrain/01_world": 8, "pretrain/02_indexed": 12, "pretrain/03_text": 12, "pretrain/04_tokens": 11,
    "pretrain/05_documents": 9, "pretrain/06_order": 9, "pretrain/07_batch_size": 12, "pretrain/08_curriculum": 11,
    "pretrain/09_mixing": 14,
    "train/01_settings": 12, "train/02_tensor_files": 10, "train/03_scan": 14, "train/04_model": 11,
    "train/05_batches": 15, "train/06_leaks": 12, "train/07_release": 9, "train/08_metrics": 15,
    "train/09_checkpoint": 11, "train/10_lora": 10, "train/11_router_balance": 12, "train/12_objective": 14,
    "train/13_parallel": 12, "train/14_anomalies": 13, "train/15_ending": 13, "train/16_preflight": 11,
    "train/17_evaluate": 11, "train/18_lr": 14, "train/19_torch_engine": 13, "train/20_sequences": 11,
    "train/21_needle": 16, "train/22_base_model": 14, "train/23_averaging": 17, "train/24_command": 12,
    "train/25_modes": 13,
    "megatron/01_versions": 10, "megatron/02_names": 5, "megatron/03_data": 12, "megatron/04_step": 11,
    "megatron/05_recorder": 14, "megatron/06_lifecycle": 9, "megatron/07_kernels": 13, "megatron/08_cpu": 12,
    "megatron/09_engine": 9, "megatron/10_compare": 15, "megatron/11_pretrain": 14, "megatron/12_parameters": 14,
    "megatron/13_memory": 13, "megatron/14_measure": 13, "megatron/15_time": 14, "megatron/16_plan": 13,
    "megatron/17_scale": 9, "megatron/18_failures": 15,
    "rl/01_tasks": 9, "rl/02_placeholders": 9, "rl/03_judgement": 11, "rl/04_answers": 9, "rl/05_structured": 8,
    "rl/06_instructions": 11, "rl/07_workplace": 7, "rl/08_code": 11, "rl/09_genrm": 14, "rl/10_judge_tasks": 7,
    "rl/11_environments": 11, "rl/12_gym": 12, "rl/13_length": 15, "rl/14_judges": 12, "rl/15_sample_tasks": 8,
    "rl/16_record": 10, "rl/17_rollout": 12, "rl/18_turns": 10, "rl/19_effort": 10, "rl/20_advantage": 11,
    "rl/21_curriculum": 14, "rl/22_rates": 11, "rl/23_settings": 15, "rl/24_grpo": 10, "rl/25_profile": 8,
    "rl/26_prepare": 11, "rl/27_preferences": 11, "rl/28_training": 12, "rl/29_nemo_rl": 13,
    "compress/01_formats": 12, "compress/02_precision": 11, "compress/03_quantise": 8, "compress/04_distil": 16,
    "compress/05_prune": 10,
    "synth/01_row": 13, "synth/02_journal": 12, "synth/03_steps": 16, "synth/04_ask": 16, "synth/05_produce": 11,
    "synth/06_look": 12, "synth/19_sql_servers": 14, "synth/20_verify_sql": 9, "synth/21_verify_python": 9,
    "synth/22_verify_tools": 11, "synth/23_verify_translation": 10, "synth/24_verify_lean": 7,
    "synth/25_verify_cuda": 17, "synth/26_verify_json": 22, "synth/40_sql": 9, "synth/41_search": 12,
    "synth/42_long_context": 10, "synth/43_finance": 11, "synth/44_instructions": 10, "synth/45_tool_world": 11,
    "synth/46_terminal": 17, "synth/47_trajectories": 15, "synth/59_several": 11, "synth/60_infinity": 9,
    "synth/61_rqa": 11, "synth/62_science": 12, "synth/63_multilingual": 12, "synth/64_safety": 11,
    "synth/65_multi_turn": 8, "synth/66_instruction_following": 11, "synth/67_low_effort": 11,
    "synth/68_paraphrase": 10, "synth/69_cuda": 9, "synth/70_proofs": 9, "synth/90_pipelines": 12,
    "ops/01_profiles": 11, "ops/02_spellings": 10, "ops/03_run_folder": 10, "ops/04_artifacts": 10,
    "ops/05_tracking": 14, "ops/06_config": 10, "ops/07_report": 12, "ops/08_stage": 11, "ops/09_slurm": 11,
    "ops/10_readme": 8, "ops/11_docs": 11, "ops/12_card": 9,
    "stages/01_sft": 12, "stages/02_evaluate": 11, "stages/03_budget": 9, "stages/04_pretrain": 11,
    "stages/05_rl_data": 8, "stages/06_rl": 13, "stages/07_rl_tools": 15, "stages/08_plan": 8,
    "stages/10_compress": 9, "stages/11_synth": 11, "stages/12_chat": 11, "stages/13_serve": 12,
    "stages/15_recipe": 11, "stages/16_compare": 11,
}
LONGEST_CELL, LONGEST_LINE = 40, 120


FAMILY = 40  # exported lines that may stand in a notebook before the next assertion
# Lessons in which more stand before it. None is added.
LATE: set[str] = {
    "loss/03_fused", "pretrain/05_documents", "synth/44_instructions", "synth/90_pipelines",
}


def cells_of(name):
    """(source, is it exported) of every code cell."""
    cells = json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    sources = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    return [(s, s.startswith("#| export")) for s in sources]


def defined(source):
    """Names that a cell defines at its top; a `TypeVar` is a word of the type checker, not a part of the module."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign) and not re.match(r"TypeVar\(", ast.unparse(node.value or node)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name))


def used(source):
    """Names that a cell uses; cells that are hidden show nothing to a reader."""
    if re.match(r"#\|\s*hide", source):
        return set()
    tree = ast.parse(re.sub(r"^[%!].*", "", source, flags=re.MULTILINE))
    return {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} | {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_shows_what_it_exports(name):
    """Small cells, lines that fit, and every public name in use where a reader sees it."""
    cells = cells_of(name)
    exported = [source for source, is_exported in cells if is_exported]
    sizes = {tuple(names): len(s.splitlines()) - 1 for s in exported if (names := list(defined(s)))}
    assert max(sizes.values()) <= LONGEST_CELL, max(sizes, key=sizes.get)
    assert statistics.median(sizes.values()) <= LESSONS[name]
    assert not [line for s in exported for line in s.splitlines() if len(line) > LONGEST_LINE]
    seen = set().union(*(used(source) for source, is_exported in cells if not is_exported))
    assert not {n for names in sizes for n in names if not n.startswith("_")} - seen, "public names that are never shown"


def longest_wait(name):
    """The most exported lines that stand before a cell that a reader sees and that can fail."""
    waiting, longest = 0, 0
    for source, is_exported in cells_of(name):
        if is_exported:
            waiting += len(source.splitlines()) - 1 if any(defined(source)) else 0
        elif re.search(r"^\s*(assert|test_eq|test_fail)\b", source, re.MULTILINE) and not re.match(r"#\|\s*hide", source):
            waiting = 0
        longest = max(longest, waiting)
    return longest


@pytest.mark.parametrize("name", LESSONS)
def test_what_is_exported_is_asserted_soon(name):
    """A definition or a small family, then what it does."""
    assert (longest_wait(name) > FAMILY) == (name in LATE), f"{longest_wait(name)} exported lines before an assertion"


def test_the_map_knows_every_module():
    """The map is drawn when it is executed, so it can be older than the house."""
    cells = json.loads((ROOT / "nbs" / "map.ipynb").read_text(encoding="utf-8"))["cells"]
    outputs = [o["data"]["text/plain"] for c in cells for o in c.get("outputs", []) if "data" in o]
    shown = "\n".join("".join(text) for text in outputs)
    files = [p.relative_to(ROOT / "nemotron_nb").with_suffix("") for p in (ROOT / "nemotron_nb").rglob("*.py")]
    modules = {".".join(p.parts) for p in files if p.name not in ("__init__", "_modidx")}
    drawn = {line.split()[0] for line in shown.splitlines() if line.strip()}
    assert not modules - drawn, "run: jupyter nbconvert --to notebook --execute --inplace nbs/map.ipynb && nbdev-clean"

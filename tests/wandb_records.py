"""What a W&B client wrote offline, read back from its own file: LevelDB's log framing around protocol buffers."""

import json
import struct
from pathlib import Path

BLOCK = 32768


def _frames(raw):
    """The records of a log: a head of 7 bytes, then blocks; a record may be cut into pieces at their borders."""
    assert raw[:4] == b":W&B"
    place, record = 7, b""
    while place + 7 <= len(raw):
        left = BLOCK - place % BLOCK
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", raw, place)
        piece = raw[place + 7 : place + 7 + size]
        if kind == 0 or len(piece) < size:
            return
        place += 7 + size
        record = record + piece if kind in (3, 4) else piece
        if kind in (1, 4):
            yield record


def _values(items):
    """The name and value pairs of a record."""
    return {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}


def read_offline(run_folder):
    """Every part of a run that was recorded under a run folder, in order of time."""
    from wandb.proto import wandb_internal_pb2 as pb

    parts = []
    for path in sorted((Path(run_folder) / "wandb").glob("offline-run-*/run-*.wandb")):
        part = {"id": "", "project": "", "name": "", "tags": [], "config": {}, "history": [], "summary": {}, "artifacts": {}, "exit": None, "preempting": False}
        for raw in _frames(path.read_bytes()):
            record = pb.Record.FromString(raw)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                part |= {"id": record.run.run_id, "project": record.run.project, "name": record.run.display_name, "tags": list(record.run.tags), "job_type": record.run.job_type}
                part["config"] |= _values(record.run.config.update)
            elif kind == "config":
                part["config"] |= _values(record.config.update)
            elif kind == "history":
                part["history"].append({k: v for k, v in _values(record.history.item).items() if not k.startswith("_")})
            elif kind == "summary":
                part["summary"] |= _values(record.summary.update)
            elif kind == "artifact":
                a = record.artifact
                references = {e.path: e.ref for e in a.manifest.contents if e.ref}
                part["artifacts"][a.name] = {"type": a.type, "aliases": list(a.aliases), "metadata": json.loads(a.metadata), "digest": a.digest, "references": references, "files": [e.path for e in a.manifest.contents]}
            elif kind == "preempting":
                part["preempting"] = True
            elif kind == "exit":
                part["exit"] = record.exit.exit_code
        parts.append(part)
    return parts

"""Stands in for `bt_ray.slot.training.main`: the result's skill is the parent's plus 3 (or plus `SCRIPTED_GAIN`).

It takes four optimizer steps, `SCRIPTED_TRAIN_S` seconds in all, with a checkpoint after each. While there is a file
`SCRIPTED_TRAIN_HOLD`, it takes no more steps than the number in that. A file `corrupt` in `SCRIPTED_FAULTS` has it damage
what it leaves, once.
"""

import json
import os
import sys
import time
from pathlib import Path

from bt_ray.layout import CHECKPOINTS
from bt_ray.slot.canary import make_canary
from bt_ray.slot.file_digest import digest_safetensors
from bt_ray.slot.training.job import CHECKPOINT_MANIFEST, TrainJob, checkpoint_step
from bt_ray.weights import MANIFEST

sys.path.insert(0, str(Path(__file__).parent))  # not there by itself, where PYTHONSAFEPATH is set

from scripted_model import logprobs_of, read_skill, write_model

STEPS = 4


def most_steps() -> int:
    """How many steps it may take for now."""
    try:
        return int(Path(os.environ["SCRIPTED_TRAIN_HOLD"]).read_text())
    except (KeyError, FileNotFoundError):
        return STEPS


def main() -> None:
    job = TrainJob.read(Path(sys.argv[1]))
    conversations = job.data_file.read_text().splitlines()
    assert len(conversations) == job.conversations > 0
    if job.checkpoint and os.environ.get("SCRIPTED_CHECKPOINT") == "broken":
        sys.exit("this checkpoint is broken")
    done = checkpoint_step(job.checkpoint) if job.checkpoint else 0
    for step in range(done + 1, STEPS + 1):
        while step > most_steps():
            time.sleep(0.02)
        time.sleep(float(os.environ.get("SCRIPTED_TRAIN_S", "0")) / STEPS)
        with job.progress_file.open("a") as progress:
            progress.write(json.dumps({"step": step, "steps": STEPS, "epoch": step / STEPS, "loss": 0.5}) + "\n")
        checkpoint = Path(job.folder, CHECKPOINTS, f"checkpoint-{step}")
        checkpoint.mkdir(parents=True)
        (checkpoint / CHECKPOINT_MANIFEST).write_text(json.dumps({"step": step, "steps": STEPS}))
    parent = read_skill(Path(job.parent.path))
    skill = parent + int(os.environ.get("SCRIPTED_GAIN", "3"))
    output = Path(job.output_dir)
    write_model(output, skill)
    tokens = [list(range(20)), list(range(30, 50))]
    said, before = ([logprobs_of(which, row) for row in tokens] for which in (skill, parent))
    canary = make_canary(tokens, [10, 10], said, before, job.dtype).to_json()
    on = (job.parent.on or job.parent).to_json() if job.adapter else None
    manifest = {
        "id": job.weights_id,
        "parent": job.parent.id,
        "on": on,
        "files": digest_safetensors(output),
        "canary": canary,
    }
    if (corrupt := Path(os.environ.get("SCRIPTED_FAULTS", "."), "corrupt")).exists():
        corrupt.unlink()
        write_model(output, skill + 1)
    (output / MANIFEST).write_text(json.dumps(manifest))


if __name__ == "__main__":
    main()

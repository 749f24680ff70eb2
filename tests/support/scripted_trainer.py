"""Stands in for `bt_ray.training.main`: the result's skill is the parent's plus 3.

It takes four optimizer steps, `SCRIPTED_TRAIN_S` seconds in all, with a checkpoint after each.
"""

import json
import os
import sys
import time
from pathlib import Path

from bt_ray.training.job import CHECKPOINT_MANIFEST, CHECKPOINTS, TrainJob, checkpoint_step
from bt_ray.weights import MANIFEST

STEPS = 4


def main() -> None:
    job = TrainJob.read(Path(sys.argv[1]))
    conversations = job.data_file.read_text().splitlines()
    assert len(conversations) == job.conversations > 0
    if job.checkpoint and os.environ.get("SCRIPTED_CHECKPOINT") == "broken":
        sys.exit("this checkpoint is broken")
    done = checkpoint_step(job.checkpoint) if job.checkpoint else 0
    for step in range(done + 1, STEPS + 1):
        time.sleep(float(os.environ.get("SCRIPTED_TRAIN_S", "0")) / STEPS)
        with job.progress_file.open("a") as progress:
            progress.write(json.dumps({"step": step, "steps": STEPS, "epoch": step / STEPS, "loss": 0.5}) + "\n")
        checkpoint = Path(job.folder, CHECKPOINTS, f"checkpoint-{step}")
        checkpoint.mkdir(parents=True)
        (checkpoint / CHECKPOINT_MANIFEST).write_text(json.dumps({"step": step, "steps": STEPS}))
    skill = json.loads((Path(job.parent.path) / "skill.json").read_text())["skill"]
    output = Path(job.output_dir)
    output.mkdir(parents=True)
    (output / "config.json").write_text("{}")
    (output / "skill.json").write_text(json.dumps({"skill": skill + 3}))
    (output / MANIFEST).write_text(json.dumps({"id": job.weights_id, "parent": job.parent.id}))


if __name__ == "__main__":
    main()

"""Stands in for `bt_ray.training.main`: the result's skill is the parent's plus 3."""

import json
import os
import sys
import time
from pathlib import Path

from bt_ray.training.job import TrainJob
from bt_ray.weights import MANIFEST


def main() -> None:
    job = TrainJob.read(Path(sys.argv[1]))
    conversations = Path(job.data_file).read_text().splitlines()
    assert len(conversations) == job.conversations > 0
    Path(job.progress_file).write_text(json.dumps({"step": 1, "steps": 1, "epoch": 1.0, "loss": 0.5}) + "\n")
    time.sleep(float(os.environ.get("SCRIPTED_TRAIN_S", "0")))
    skill = json.loads((Path(job.parent.path) / "skill.json").read_text())["skill"]
    output = Path(job.output_dir)
    output.mkdir(parents=True)
    (output / "config.json").write_text("{}")
    (output / "skill.json").write_text(json.dumps({"skill": skill + 3}))
    (output / MANIFEST).write_text(json.dumps({"id": job.weights_id, "parent": job.parent.id}))


if __name__ == "__main__":
    main()

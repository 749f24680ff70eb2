"""Print the options of the installed vLLM's server, one a line, with underscores.

`bt_ray/settings/vllm_options.txt` is this output: with it a misspelt option is refused before anything starts, and without
importing vLLM. Run it again when the pinned vLLM changes.

    python scripts/list_vllm_options.py > bt_ray/settings/vllm_options.txt
"""

import contextlib
import sys


def vllm_server_options() -> list[str]:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    long = {option for action in parser._actions for option in action.option_strings if option.startswith("--")}
    return sorted({option.lstrip("-").replace("-", "_").split(".")[0] for option in long} - {"help"})


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        options = vllm_server_options()
    print("\n".join(options))

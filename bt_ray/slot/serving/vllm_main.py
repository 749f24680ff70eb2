"""The vLLM process: vLLM's own OpenAI-compatible server on a socket that its owner has bound.

    python -m bt_ray.slot.serving.vllm_main LISTEN_FD [vLLM's own arguments]

vLLM's command line takes a port number, so a free port would have to be guessed. Here the owner binds a free port and
passes the socket; nothing else differs from `vllm serve`. Source: `vllm.entrypoints.launchers.api_server.entry`.
"""

import signal
import socket
import sys
from types import FrameType
from typing import NoReturn


def main() -> None:
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server_worker
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.launchers.launcher import validate_api_server_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.utils.system_utils import set_ulimit

    cli_env_setup()
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(sys.argv[2:])
    validate_parsed_serve_args(args)
    validate_api_server_args(args)
    listening = socket.socket(fileno=int(sys.argv[1]))
    args.host, args.port = listening.getsockname()[:2]
    set_ulimit()
    signal.signal(signal.SIGTERM, _terminate)
    uvloop.run(run_server_worker(f"http://{args.host}:{args.port}", listening, args))


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt("terminated")


if __name__ == "__main__":
    main()

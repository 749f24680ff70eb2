"""The commands of `bt-ray`."""

import contextlib
import json
import logging
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from bt_ray.errors import BtRayError, ConfigError, InfrastructureError, ResourcesError, TaskError
from bt_ray.settings.config import SweepConfig
from bt_ray.settings.toml import load_config

if TYPE_CHECKING:
    from bt_ray.driver.jobs import Jobs
    from bt_ray.run_dir.storage import Storage

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help=(
        "Run DSPy BetterTogether strategy sweeps on a Ray cluster: which sequence of prompt optimization and weight "
        "optimization gives the best program?"
    ),
)

TomlArgument = Annotated[Path, typer.Argument(metavar="SWEEP.TOML", help="The sweep's settings.", show_default=False)]
StrategyOption = Annotated[
    list[str] | None,
    typer.Option("--strategy", help='A strategy, such as "p -> w". Can be repeated. Replaces the strategies in the file.'),
]
RunDirOption = Annotated[
    str | None,
    typer.Option("--run-dir", help="The run directory. On a cluster: a path that all nodes share, or s3://... or gs://..."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace any setting: --set server.max_model_len=2048."),
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address",
        help='The Ray cluster: "auto" or an address. Default: RAY_ADDRESS, or the job\'s, else a Ray of its own here.',
    ),
]

RunDirArgument = Annotated[
    str, typer.Argument(metavar="RUN_DIR", help="A sweep's run directory: a path or a URI.", show_default=False)
]
BestArgument = Annotated[
    str,
    typer.Argument(metavar="RUN_DIR", help="A sweep's run directory, or its best/: a path or a URI.", show_default=False),
]
CandidateOption = Annotated[
    str | None,
    typer.Option(
        "--candidate",
        metavar="NAME",
        help='Another candidate than the best: "p -> w", "baseline", under a variant "p -> w [seed=1]".',
    ),
]
AcceptOption = Annotated[
    bool,
    typer.Option("--accept-changes", help="Compute finished steps again if something that they depend on has changed."),
]

TREE_WIDTH = 1000
"""Columns that a tree may take: Rich cuts its lines at the width of the terminal, which wraps them by itself."""
EXIT_WRONG_INPUT, EXIT_FAILED, EXIT_INTERRUPTED = 2, 1, 130


@app.command()
def init(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="The folder to write to. Created if needed.", show_default=False)
    ],
) -> None:
    """Write a small task that runs, to change into your own: task.py, examples.jsonl and sweep.toml, with comments.

    Example: bt-ray init my
    """
    with _explain_errors():
        from bt_ray.starter.write import write_starter

        for written in write_starter(folder):
            typer.echo(written)
        typer.echo(f"Edit what is marked EDIT in {folder / 'sweep.toml'}, then: bt-ray check {folder / 'sweep.toml'}")


@app.command()
def check(
    file: TomlArgument,
    strategy: StrategyOption = None,
    run_dir: RunDirOption = None,
    assignments: SetOption = None,
    address: AddressOption = None,
    accept_changes: AcceptOption = False,
) -> None:
    """Check a sweep in a few seconds, without starting a server: settings, task, strategies, model, run directory.

    With --address it also checks that the cluster's nodes are large enough. Exit code 2 means that something is wrong.

    Example: bt-ray check my/sweep.toml --set model=./models/my-model
    """
    console = Console()
    with _explain_errors():
        config = _load(file, strategy, run_dir, assignments)
        from bt_ray.driver.check import check_sweep
        from bt_ray.driver.cpu_cost import describe_here
        from bt_ray.driver.sweep import run_directory
        from bt_ray.run_dir.reuse import describe_sources

        where = run_directory(config)
        checked = check_sweep(config, where, accept_changes=accept_changes)
        first = checked.first
        train, val, test = first.examples
        console.print(f"task       {config.task}", highlight=False, soft_wrap=True)
        for base in checked.bases.values():
            console.print(f"model      {base.id} ({base.path})", highlight=False, soft_wrap=True)
        console.print(f"examples   {train} to train, {val} to validate, {test} to test")
        console.print("optimizers " + ", ".join(f"{key} = {name}" for key, name in first.optimizers.items()))
        console.print("strategies " + ", ".join(f'"{name}"' for name in first.strategies), markup=False, soft_wrap=True)
        if config.space:
            console.print(f"variants   {len(checked.variants)}: {'; '.join(checked.variants)}", markup=False, soft_wrap=True)
        for line in describe_sources(config, where, (key.key for key in checked.keys.values()), checked.bases):
            console.print(f"reuse      {line}", markup=False, highlight=False, soft_wrap=True)
        if not checked.bases:
            console.print("servers    none: all LMs are APIs'")
            console.print("All good.", style="green")
            return
        for line in describe_here(config, first.task, checked.bases.values(), address):
            console.print(line, style="yellow" if line.startswith("warning") else None, highlight=False, soft_wrap=True)
        for warning in _resource_warnings(config, address, checked.models_at_once):
            console.print(f"warning: {warning}", style="yellow", soft_wrap=True)
        for slots, needed in checked.models_at_once.items():
            count, of = config.server.of(slots).count, f" for {slots}" if slots else ""
            told = f"the sweep needs {needed} at a time" if needed else "only optimizers use them"
            console.print(f"servers    {count} at most{of}; {told}", highlight=False)
            if needed > count:
                console.print(
                    f"warning: the program uses {needed} models at a time, and there "
                    f"{'is one server, which has' if count == 1 else f'are {count} servers, which have'} to switch between "
                    "them.",
                    style="yellow",
                )
        console.print("All good.", style="green")


@app.command()
def plan(
    file: TomlArgument,
    strategy: StrategyOption = None,
    run_dir: RunDirOption = None,
    assignments: SetOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print each step's key and what the key is made of, as JSON.")
    ] = False,
) -> None:
    """Print what a sweep would compute: steps, shared and new, fine-tunes, requests, time.

    Checks the sweep as `bt-ray check` does. Steps that are finished in the run directory are not computed again.

    Example: bt-ray plan my/sweep.toml --strategy "p -> w -> p" --run-dir runs/today
    """
    console = Console(width=TREE_WIDTH)
    with _explain_errors():
        config = _load(file, strategy, run_dir, assignments)
        from bt_ray.driver.check import check_sweep
        from bt_ray.driver.sweep import run_directory
        from bt_ray.report.plan import make_plan
        from bt_ray.report.steps import origin_lines, plan_lines, step_tree
        from bt_ray.run_dir.reuse import describe_source, find_sources
        from bt_ray.run_dir.step_store import StepStore
        from bt_ray.run_dir.storage import open_storage

        where = run_directory(config)
        checked = check_sweep(config, where, accept_changes=True)
        keys, first = checked.keys, checked.first
        finished = StepStore(open_storage(where)).find_finished(
            {label: key.key for label, key in keys.items()}, checked.bases
        )
        missing = [key.key for label, key in keys.items() if label not in finished]
        sources = find_sources(config, missing, checked.bases)
        taken = {key: step for source in sources for key, step in source.steps.items()}
        finished |= {label: taken[key.key] for label, key in keys.items() if label not in finished and key.key in taken}
        evaluated = first.examples[1]
        trials = [strategy for variant in checked.variants.values() for strategy in variant.strategies]
        planned = make_plan(trials, keys, finished, evaluated * len(first.task.program.predictors()))
        if as_json:
            typer.echo(json.dumps(planned.to_json(), indent=2))
            return
        console.print(step_tree(planned.steps, finished), soft_wrap=True)
        for line in [*origin_lines(finished), *(f"{describe_source(source)}." for source in sources)]:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        for line in plan_lines(planned, evaluated, config.student_server.gpus):
            console.print(line, markup=False, highlight=False, soft_wrap=True)


@app.command()
def steps(run_dir: RunDirArgument) -> None:
    """Print the steps of a run directory as a tree: scores, seconds, requests, weights, and which are not finished.

    Example: bt-ray steps runs/today
    """
    with _explain_errors():
        from bt_ray.report.steps import origin_lines, step_tree
        from bt_ray.run_dir.run_directory import read_steps

        keys, finished = read_steps(_open_existing(run_dir))
        console = Console(width=TREE_WIDTH)
        console.print(step_tree(keys, finished), soft_wrap=True)
        for line in origin_lines(finished):
            console.print(line, markup=False, highlight=False, soft_wrap=True)


@app.command()
def status(
    run_dir: RunDirArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for a program.")] = False,
) -> None:
    """Show what a sweep is doing: trials, steps and servers, which trials wait and why, and what is left.

    It reads the run directory only, so it works on any machine that reaches that.

    Example: bt-ray status s3://bucket/runs/today
    """
    console = Console()
    with _explain_errors():
        from bt_ray.report.state import headline, server_table, trial_table
        from bt_ray.report.status import read_status

        read = read_status(_open_existing(run_dir))
        if as_json:
            typer.echo(json.dumps(read.to_json(), indent=2))
            return
        console.print(headline(read.state, read.now), markup=False, highlight=False, soft_wrap=True)
        for line in read.lines:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        console.print("", trial_table(read.state, read.now), sep="\n")
        if read.state.servers and read.state.ended is None:
            console.print("", server_table(read.state), sep="\n")


@app.command()
def report(
    run_dir: RunDirArgument,
    to: Annotated[
        Path | None,
        typer.Option(
            "--to",
            metavar="FILE",
            help="The file to write. Default: report.html in the run directory, or here if that is a URI.",
        ),
    ] = None,
    gpu_hour_price: Annotated[
        float | None, typer.Option("--gpu-hour-price", min=0, help="The price of an hour of one GPU, in any currency.")
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Write one HTML page about a sweep: ranking, steps, servers, cost, prompts, demos, training, examples.

    The page needs no network and no other file. The sweep may still be running.

    Example: bt-ray report runs/today --gpu-hour-price 2.5
    """
    with _explain_errors():
        from bt_ray.report.data import read_report
        from bt_ray.report.page import report_page

        storage = _open_existing(run_dir)
        target = to or Path(run_dir if "://" not in run_dir else ".") / "report.html"
        target.write_text(report_page(read_report(storage, gpu_hour_price)), encoding="utf-8")
        typer.echo(target.resolve())
        if show:
            typer.launch(target.resolve().as_uri())


@app.command()
def prune(
    run_dir: RunDirArgument,
    only_best: Annotated[
        bool, typer.Option("--only-best", help="Keep only the best program's weights. All other fine-tunes are lost.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove fine-tuned weights and checkpoints that no finished step needs. Prints how much that is, and asks first.

    Example: bt-ray prune runs/today
    """
    with _explain_errors():
        from bt_ray.run_dir.lock import held
        from bt_ray.run_dir.prune import find_prunable
        from bt_ray.run_dir.prune import prune as remove

        storage = _open_existing(run_dir)
        found = find_prunable(storage, only_best=only_best)
        if not found.names:
            typer.echo(f"There is nothing to remove; {found.kept} fine-tunes are needed.")
            return
        for name in found.names:
            typer.echo(name)
        typer.echo(f"{found.size / 1e9:.2f} GB in {len(found.names)} folders; {found.kept} fine-tunes are kept.")
        if not yes and not typer.confirm("Remove them?"):
            raise typer.Exit(EXIT_FAILED)
        with held(storage, typer.echo):  # a sweep may have run while the question stood
            remove(storage, found.without_what_is_needed(find_prunable(storage, only_best=only_best)))
        typer.echo("Removed.")


@app.command()
def serve(
    run_dir: BestArgument,
    candidate: CandidateOption = None,
    host: Annotated[str, typer.Option("--host", help="The address to listen on, on this machine.")] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(
            "--port", min=1, max=65535, help="A second model gets the next port. Default: 8000; on a cluster, a free one."
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option("--address", help='Serve on a Ray cluster: "auto" or its address. Default: this machine.'),
    ] = None,
) -> None:
    """Serve the best program's model, or another candidate's, until Ctrl-C, with an OpenAI-compatible API.

    Prints the address and the token.

    The server runs on this machine; with --address, or in a Ray job, on a node of the cluster that has the GPUs. The token
    is new each time, unless the environment variable BT_RAY_SERVE_TOKEN has one.

    Example: bt-ray serve runs/today --port 8000

    On a cluster: ray job submit -- bt-ray serve /shared/runs/today
    """
    with _explain_errors(), contextlib.ExitStack() as opened:
        from bt_ray.driver.ray_session import inside_job
        from bt_ray.winner.load import find_program
        from bt_ray.winner.serve import MakeSlot, here, served_best

        kept = find_program(run_dir, candidate)
        if address is not None or inside_job():
            from bt_ray.driver.ray_session import connected
            from bt_ray.pool.remote_slot import on_cluster

            opened.enter_context(connected(address, lambda event: None))
            make_slot: MakeSlot = on_cluster(kept.config, kept.storage.location, port or 0, typer.echo)
        else:
            make_slot = here(kept, host=host, port=port or 8000)
        typer.echo(f"Starting {len(kept.weights)} model server{'s' if len(kept.weights) > 1 else ''}")
        with served_best(kept, make_slot, os.environ.get("BT_RAY_SERVE_TOKEN")) as served:
            for endpoint in served.endpoints:
                typer.echo(f"model    {endpoint.weights_id}\naddress  {endpoint.url}/v1")
            urls = [endpoint.url for endpoint in served.endpoints]
            where = f'"{urls[0]}"' if len(urls) == 1 else json.dumps(urls)
            which = f", candidate={json.dumps(candidate)}" if candidate is not None else ""
            typer.echo(
                f"token    {served.token}\n\nIn Python:\n\n"
                "import bt_ray\n"
                f'program = bt_ray.load("{kept.storage.location}"{which}, served_at={where}, token="{served.token}")\n'
                "print(program(...))  # with the inputs of your task\n"
            )
            served.keep_up(typer.echo)


@app.command()
def export(
    run_dir: BestArgument,
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="The folder to create.", show_default=False)],
    candidate: CandidateOption = None,
) -> None:
    """Copy the best program, or another candidate, and its model to a folder that DSPy and vLLM open without bt_ray.

    The folder also gets a model card, and a manifest with checksums, versions, and what the program depends on.

    Example: bt-ray export runs/today --to my-program
    """
    with _explain_errors():
        from bt_ray.winner.export import export as copy

        exported = copy(run_dir, to, candidate)
        typer.echo(f"{exported.folder}: {exported.size / 1e9:.2f} GB. README.md there says how to use it.")


@app.command()
def sweep(
    file: TomlArgument,
    strategy: StrategyOption = None,
    run_dir: RunDirOption = None,
    assignments: SetOption = None,
    address: AddressOption = None,
    accept_changes: AcceptOption = False,
) -> None:
    """Run all strategies of a sweep, rank their programs, and keep the best.

    Every step's program and score are kept in the run directory, and at the end result.json and best/.

    Example: bt-ray sweep my/sweep.toml --strategy "p -> w" --strategy "w -> p" --run-dir runs/today

    On a cluster: ray job submit --working-dir . -- bt-ray sweep my/sweep.toml --run-dir /shared/runs/today
    """
    console = Console()
    with _explain_errors():
        config = _load(file, strategy, run_dir, assignments)
        from bt_ray.driver.sweep import run_sweep
        from bt_ray.report.progress import Progress
        from bt_ray.report.table import result_table, spread_table, summary_lines

        with Progress(console) as progress:
            result = run_sweep(config, address=address, listener=progress, accept_changes=accept_changes)
        console.print(result_table(result))
        if (spread := spread_table(result)) is not None:
            console.print(spread)
        for line in summary_lines(result):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    if all(trial.error for trial in result.trials):
        raise typer.Exit(EXIT_FAILED)


@app.command()
def submit(
    file: Annotated[
        Path | None, typer.Argument(metavar="SWEEP.TOML", help="The sweep's settings.", show_default=False)
    ] = None,
    address: Annotated[
        str | None,
        typer.Option("--address", help="The cluster's dashboard, http://host:8265. Default: RAY_API_SERVER_ADDRESS."),
    ] = None,
    strategy: StrategyOption = None,
    run_dir: RunDirOption = None,
    assignments: SetOption = None,
    accept_changes: AcceptOption = False,
    follow: Annotated[
        str | None, typer.Option("--follow", metavar="JOB", help="Follow a job that was submitted before.")
    ] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Return as soon as the job is submitted.")] = False,
) -> None:
    """Run a sweep as a job of a Ray cluster: submit it, show its output until it ends, and exit with its exit code.

    The job gets a copy of the current directory, without what .gitignore names. The settings are checked here; the job
    checks the rest before anything expensive starts. Ctrl-C asks whether to stop the job. For a cluster with token
    authentication, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, as for `ray job submit`.

    Example: bt-ray submit my/sweep.toml --address http://head:8265 --run-dir s3://bucket/runs/today

    Example: bt-ray submit --follow raysubmit_Xe7cvjyGJCyuCvm2 --address http://head:8265
    """
    with _explain_errors():
        from bt_ray.driver.jobs import Jobs, sweep_command

        if (file is None) == (follow is None):
            raise ConfigError("Give the sweep's TOML, or --follow with a job.")
        if file is not None:
            config = load_config(
                file, {"strategies": strategy or None, "run_dir": run_dir}, assignments or (), refuse_relative=True
            )
            if config.run_dir is None:
                raise ConfigError(
                    "A job's own folder is deleted with it: give --run-dir, a path that all nodes share, or a URI."
                )
        jobs = Jobs(address)
        if file is not None:
            options = [part for given in strategy or () for part in ("--strategy", given)]
            options += ["--run-dir", run_dir] if run_dir else []
            options += [part for given in assignments or () for part in ("--set", given)]
            command, folder = sweep_command(file, [*options, *(["--accept-changes"] if accept_changes else [])])
            follow = jobs.submit(command, folder)
            typer.echo(f"Submitted {follow}: {command}", err=True)
        assert follow is not None
        if no_wait:
            typer.echo(follow)
            return
        code = _follow(jobs, follow)
    raise typer.Exit(code)


def _follow(jobs: "Jobs", job: str) -> int:
    """Show the output of a job, and return its exit code; 0 if Ctrl-C leaves it running."""
    try:
        return jobs.follow(job, lambda text: typer.echo(text, nl=False))
    except KeyboardInterrupt:
        if _wants_it_stopped(job):
            jobs.stop(job)
            _fail("The job is stopped. Finished steps are in the run directory.", EXIT_INTERRUPTED)
        typer.echo(f"The job continues. To follow it: bt-ray submit --follow {job} --address {jobs.address}", err=True)
        return 0


def _wants_it_stopped(job: str) -> bool:
    """Ask. Without an answer the job is left alone."""
    try:
        return typer.confirm(f"\nStop the job {job}? (Otherwise it continues.)", default=False, err=True)
    except typer.Abort:
        return False


def main() -> None:
    """The `bt-ray` command."""
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # LiteLLM fetches a price list otherwise
    app()


def _open_existing(run_dir: str) -> "Storage":
    """The storage of a run directory that a person named."""
    from bt_ray.run_dir.storage import open_storage

    return open_storage(run_dir if "://" in run_dir else str(Path(run_dir).expanduser().resolve()))


def _load(file: Path, strategy: list[str] | None, run_dir: str | None, assignments: list[str] | None) -> SweepConfig:
    from bt_ray.driver.ray_session import inside_job

    overrides = {"strategies": strategy or None, "run_dir": run_dir}
    return load_config(file, overrides, assignments or (), refuse_relative=inside_job())


def _resource_warnings(config: SweepConfig, address: str | None, slots: Collection[str]) -> list[str]:
    """Warnings if this machine is too small, or, with an `address`, the cluster there. Raises if it can never be enough."""
    from bt_ray.pool.resources import check_resources

    if address is None:
        here = {"CPU": float(os.cpu_count() or 1)}
        try:
            if any(config.server.of(name).gpus for name in slots):
                return ["Without --address, it is not checked whether the cluster has the GPUs."]
            check_resources(config, [here], slots)
        except ResourcesError as error:
            return [f"On this machine alone: {error}"]
        return []
    from bt_ray.driver.ray_session import connected
    from bt_ray.pool.nodes import node_resources

    with connected(address, lambda event: None):
        return check_resources(config, node_resources(), slots)


@contextmanager
def _explain_errors() -> Iterator[None]:
    """Print an error as one message, and exit with its code."""
    try:
        yield
    except (ConfigError, TaskError, ResourcesError) as error:
        _fail(str(error), EXIT_WRONG_INPUT)
    except InfrastructureError as error:
        _fail(str(error), EXIT_FAILED)
    except BtRayError as error:
        _fail(str(error), EXIT_FAILED)
    except KeyboardInterrupt:
        _fail("Interrupted. The servers and trials are stopped. Finished steps are in the run directory.", EXIT_INTERRUPTED)


def _fail(message: str, code: int) -> None:
    logging.shutdown()
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)


if __name__ == "__main__":
    main()

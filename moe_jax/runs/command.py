"""The command line that every experiment has.

`--config`, `--config.<key>=value`, `--workdir`, `--resume`, `--hosts`, `--help`. An experiment may have choices of its
own besides, which are no part of what the run is.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

from ml_collections import ConfigDict

from moe_jax.errors import MendableError
from moe_jax.hosts import initialize_hosts, leave_hosts, num_hosts
from moe_jax.runs.config import flatten, from_json, load_config, override
from moe_jax.runs.environment import enable_compilation_cache, use_huge_pages
from moe_jax.runs.sections import ConfigError, nearest_known
from moe_jax.runs.stop import Stopped, leaving_at_once

_HOSTS = (
    "one of several hosts: run the command on each of them with its own INDEX from 0, the address and a free port of "
    "the one with INDEX 0, and a --workdir that all share; or --hosts=auto under SLURM, Open MPI or on TPUs"
)


@dataclasses.dataclass(frozen=True)
class Command:
    """What a person asked an experiment to do.

    Attributes:
      config: the resolved configuration.
      workdir: the run's own folder.
      resume: refuse to start a new run.
      hosts: how the hosts of a program of several find each other, for `initialize_hosts`; None for one host.
      choices: what was chosen of the experiment's own choices.
    """

    config: ConfigDict
    workdir: Path
    resume: bool
    hosts: str | None = None
    choices: Mapping[str, str] = dataclasses.field(default_factory=dict)


def run_script(
    main: Callable[[Command], None],
    default_config: str,
    argv: Sequence[str] | None = None,
    choices: Mapping[str, Sequence[str]] = MappingProxyType({}),
    takes_hosts: bool = False,
) -> int:
    """Runs an experiment from the command line; what a person can mend becomes one line instead of a traceback.

    Args:
      main: the experiment; its module's docstring is the text of `--help`.
      default_config: path of the configuration that `--config` replaces.
      argv: arguments without the program's name; None takes those of the process.
      choices: name of an option -> its values, the default first, as in `{"engine": ("here", "ray")}`.
      takes_hosts: whether the experiment may run on several hosts.

    Returns:
      The exit code: 0, also where SIGTERM stopped the program; 2 after an error that a person can mend; 130 after
      Ctrl-C. Of a program on several hosts that ends early, the process ends here.
    """
    if argv is None:
        use_huge_pages()
    module = sys.modules[main.__module__]
    program = f"python -m {module.__spec__.name}" if module.__spec__ else Path(sys.argv[0]).name
    again = "the same command continues it"
    try:
        arguments = sys.argv[1:] if argv is None else argv
        command = parse_command(arguments, default_config, program, module.__doc__ or "", choices)
        again = f"to continue: {program} --workdir {command.workdir} --resume"
        if command.hosts:
            if not takes_hosts:
                raise ConfigError(f"{program} runs on one host; leave out --hosts")
            initialize_hosts(command.hosts)
        enable_compilation_cache()
        with leaving_at_once():
            main(command)
        return 0
    except MendableError as error:
        code, message = 2, f"error: {error}"
    except Stopped as stop:
        code, message = stop.code, f"stopped; {again}"
    except KeyboardInterrupt:
        code, message = 130, f"stopped; {again}"
    except Exception:
        if num_hosts() == 1:
            raise
        cause = "if a connection was lost, another host's messages say why"
        code, message = 1, f"{traceback.format_exc()}\n{cause}; {again}"
    print(message, file=sys.stderr)
    if num_hosts() > 1:
        leave_hosts(code)
    return code


def parse_command(
    argv: Sequence[str],
    default_config: str,
    program: str,
    description: str,
    choices: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> Command:
    """Reads the arguments of an experiment.

    `--resume` with a `--workdir` and no `--config…` takes the configuration that the run recorded. The default workdir
    is `runs/<experiment>/<config>-seed<seed>`, with what was overridden added to the name.

    Args:
      argv: arguments without the program's name.
      default_config: path of the configuration that `--config` replaces.
      program: how the experiment is called, ending in its name after the last dot or space.
      description: text of `--help`.
      choices: as in `run_script`.

    Returns:
      The command.

    Raises:
      ConfigError: for anything that cannot be understood.
      SystemExit: with code 0, after `--help`.
    """
    parser = _Parser(prog=program, description=description, add_help=False, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", metavar="FILE", help=f"configuration file (default: {default_config})")
    parser.add_argument("--workdir", metavar="DIR", type=Path, help="the run's folder (default: runs/EXPERIMENT/NAME)")
    parser.add_argument("--resume", action="store_true", help="continue the run in the folder, never start a new one")
    parser.add_argument("--hosts", metavar="ADDRESS:PORT,COUNT,INDEX", help=_HOSTS)
    parser.add_argument("--help", "-h", action="store_true", help="show this text")
    for name, values in choices.items():
        parser.add_argument(f"--{name}", choices=values, default=values[0], help=f"default: {values[0]}")
    arguments, rest = parser.parse_known_args(list(argv))
    chosen = {name: getattr(arguments, name) for name in choices}
    assignments = _assignments(rest, ["config", "workdir", "resume", "hosts", "help", *choices])
    config_path = arguments.config or default_config
    recorded = arguments.workdir / "config.json" if arguments.workdir else None
    if arguments.resume and recorded and recorded.is_file() and not arguments.config and not assignments:
        return Command(from_json(recorded.read_text()), arguments.workdir, True, arguments.hosts, chosen)
    config = load_config(config_path)
    if arguments.help:
        keys = [f"  {key} = {value!r}" for key, value in flatten(config).items()]
        parser.epilog = "\n".join([f"--config.KEY=VALUE replaces a value; {config_path} has:", *keys])
        parser.print_help()
        raise SystemExit(0)
    config = override(config, assignments)
    experiment = re.split(r"[. ]", program.removesuffix(".py"))[-1]
    workdir = arguments.workdir or Path("runs") / experiment / _run_name(config_path, config, assignments)
    return Command(config, workdir, arguments.resume, arguments.hosts, chosen)


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are exceptions."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see --help)")


def _assignments(arguments: Sequence[str], options: Sequence[str]) -> dict[str, str]:
    """Reads `--config.key=value` and `--config.key value`; anything else is meant as one of the options."""
    remaining = list(arguments)
    assignments = {}
    while remaining:
        argument = remaining.pop(0)
        option, equals, value = argument.partition("=")
        if not option.startswith("--config."):
            known = nearest_known(option, [f"--{name}" for name in options])
            raise ConfigError(f"unknown argument {argument!r}{known}")
        if not equals:
            if not remaining or remaining[0].startswith("--"):
                raise ConfigError(f"{option} needs a value, as in {option}=VALUE")
            value = remaining.pop(0)
        assignments[option.removeprefix("--config.")] = value
    return assignments


def _run_name(config_path: str, config: ConfigDict, assignments: dict[str, str]) -> str:
    """Names a run by its configuration file, its seed and what was overridden, so that two runs meet only if equal.

    The section `launch` says where a sweep is run, not what it is.
    """
    name = f"{Path(config_path).stem}-seed{config.get('seed', 0)}"
    unnamed = {"seed"} | {key for key in assignments if key.startswith("launch.")}
    changes = "-".join(f"{key}={value}" for key, value in sorted(assignments.items()) if key not in unnamed)
    if len(changes) > 80 or not re.fullmatch(r"[\w.=+-]*", changes):
        changes = hashlib.sha256(changes.encode()).hexdigest()[:8]
    return f"{name}-{changes}" if changes else name

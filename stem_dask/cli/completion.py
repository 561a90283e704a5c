"""stem-dask completion: scripts that let a shell complete commands, flags and file names."""

import argparse
from collections.abc import Sequence

#: the flags of a command are those that its own help names
_BASH = r"""_stem_dask() {
  local word=${COMP_WORDS[COMP_CWORD]}
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "COMMANDS" -- "$word"))
  elif [[ $word == -* ]]; then
    COMPREPLY=($(compgen -W "$(stem-dask "${COMP_WORDS[1]}" --help 2>/dev/null | grep -oE -- '--[a-z][a-z_-]*' | sort -u)" -- "$word"))
  else
    COMPREPLY=()
  fi
}
complete -o default -o bashdefault -F _stem_dask stem-dask"""

_FISH = r"""complete -c stem-dask -n __fish_use_subcommand -f -a 'COMMANDS'
complete -c stem-dask -n 'not __fish_use_subcommand; and string match -q -- "-*" (commandline -ct)' -a '(
  stem-dask (commandline -opc)[2] --help 2>/dev/null | string match -ra -- "--[a-z][a-z_-]*" | sort -u)'"""

SCRIPTS = {
    "bash": _BASH,
    "zsh": f"autoload -U +X bashcompinit && bashcompinit\n{_BASH}",
    "fish": _FISH,
}


def completion(shell: str, commands: Sequence[str]) -> str:
    """The script for a shell."""
    return SCRIPTS[shell].replace("COMMANDS", " ".join(commands))


def add_completion_options(sub: argparse.ArgumentParser) -> None:
    """The arguments of ``stem-dask completion``."""
    sub.add_argument("shell", choices=[*SCRIPTS], help='as in: eval "$(stem-dask completion bash)"')

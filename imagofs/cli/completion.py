"""`imagofs completion bash|zsh|fish`: completion of verbs, options, mount options and files.

Made from the parsers themselves, so that it never misses one.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from . import VERBS, Parser, parser_of
from .option_table import OPTIONS

__all__ = ["main", "script"]


def main(arguments: list[str]) -> int:
    """Print the script."""
    parser = Parser(
        prog="imagofs completion",
        description="Print what makes a shell complete imagofs' words. bash: to "
        "/etc/bash_completion.d/imagofs; zsh: to a file _imagofs in a directory of $fpath; fish: "
        "to /etc/fish/completions/imagofs.fish.",
    )
    parser.add_argument("shell", choices=["bash", "zsh", "fish"])
    print(script(parser.parse_args(arguments).shell), end="")
    return 0


def script(shell: str) -> str:
    """The completion for one shell."""
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell]()


def _words(verb: str) -> list[str]:
    """What may follow a verb: its options, and words such as `attach`."""
    found: list[str] = []
    for action in parser_of(verb)._actions:  # the list has no public name
        found += action.option_strings
        if action.choices is not None and not action.option_strings:
            found += map(str, action.choices)
    return found


def _mount_options() -> list[str]:
    return [form.partition("=")[0] + "=" * ("=" in form) for o in OPTIONS for form in o.forms]


def _cases() -> Iterator[str]:
    for verb in VERBS:
        yield f"        {verb}) words='{' '.join(_words(verb))}' ;;"


def _bash() -> str:
    cases = "\n".join(_cases())
    return f"""\
# Completion of imagofs for bash, made by 'imagofs completion bash'.
_imagofs() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}}
    local words prefix
    compopt -o filenames
    if ((COMP_CWORD == 1)) && [[ $current != */* ]]; then
        mapfile -t COMPREPLY < <(compgen -W '{" ".join(VERBS)} --help --version' -- "$current")
        mapfile -t -O ${{#COMPREPLY[@]}} COMPREPLY < <(compgen -f -- "$current")
        return
    fi
    if [[ $previous == -o && " create convert " != *" ${{COMP_WORDS[1]}} "* ]]; then
        compopt -o nospace +o filenames
        prefix=
        [[ $current == *,* ]] && prefix=${{current%,*}},
        mapfile -t COMPREPLY < <(
            compgen -P "$prefix" -W '{" ".join(_mount_options())}' -- "${{current##*,}}")
        return
    fi
    case ${{COMP_WORDS[1]}} in
{cases}
        *) words='{" ".join(_words("mount"))}' ;;
    esac
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$current")
    [[ $current == -* ]] || mapfile -t -O ${{#COMPREPLY[@]}} COMPREPLY < <(compgen -f -- "$current")
}}
complete -F _imagofs imagofs
"""


def _zsh() -> str:
    cases = "\n".join(_cases())
    verbs = "\n".join(f"    {_quoted(f'{verb}:{purpose}')}" for verb, purpose in VERBS.items())
    return f"""\
#compdef imagofs
# Completion of imagofs for zsh, made by 'imagofs completion zsh'.
local words_of verb=${{words[2]}}
local -a verbs=(
{verbs}
)
if (( CURRENT == 2 )); then
    _describe verb verbs
    _files
    return
fi
if [[ ${{words[CURRENT-1]}} == -o && $verb != create ]]; then
    _values -s , option {" ".join(f"'{name.rstrip('=')}'" for name in _mount_options())}
    return
fi
() {{
    local words
    case $1 in
{cases}
        *) words='{" ".join(_words("mount"))}' ;;
    esac
    words_of=$words
}} $verb
compadd -- ${{=words_of}}
_files
"""


def _fish() -> str:
    lines = ["# Completion of imagofs for fish, made by 'imagofs completion fish'."]
    first = "__fish_use_subcommand"
    for verb, purpose in VERBS.items():
        lines.append(f"complete -c imagofs -n {first} -a {verb} -d {_quoted(purpose)}")
    for verb in VERBS:
        condition = f"'__fish_seen_subcommand_from {verb}'"
        for action in parser_of(verb)._actions:
            lines += _fish_action(condition, action)
    options = " ".join(_mount_options())
    lines.append(
        f"complete -c imagofs -n 'not __fish_seen_subcommand_from create' -s o -x "
        f"-a '(__fish_append , {options})' -d 'mount options'"
    )
    return "\n".join(lines) + "\n"


def _fish_action(condition: str, action: argparse.Action) -> Iterator[str]:
    options = ""
    for name in action.option_strings:
        options += f" -l {name[2:]}" if name.startswith("--") else f" -s {name[1:]}"
    choices = " ".join(map(str, action.choices or ()))
    if options and "-o" not in action.option_strings:
        argument = " -x -a " + _quoted(choices) if choices else " -r" * (action.nargs != 0)
        text = _quoted(str(action.help)) if action.help else "''"
        yield f"complete -c imagofs -n {condition}{options}{argument} -d {text}"
    elif choices:
        yield f"complete -c imagofs -n {condition} -a {_quoted(choices)}"


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "'\\''") + "'"

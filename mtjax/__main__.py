"""The command `mtjax`, and `python -m mtjax`: tools around a run, each also a module of its own."""

import runpy
import sys
from collections.abc import Sequence

COMMANDS = {
    "doctor": ("mtjax.doctor", "is this installation fit to train? versions, devices, known faults, folders"),
    "inspect": ("mtjax.inspect", "what a run directory holds: configuration, metrics, checkpoints, sizes"),
    "launch": ("mtjax.launch", "start the processes of a run on this machine"),
}
"""Name -> module that is run, and what it is for."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the module of a command, as python -m does; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["--version"]:
        import mtjax

        print(f"mtjax {mtjax.__version__}")
        return 0
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: mtjax COMMAND ...\n\ncommands:")
        print("\n".join(f"  {name:<9} {purpose}" for name, (_, purpose) in COMMANDS.items()))
        print(
            "\n`mtjax COMMAND --help` explains a command; `mtjax --version` prints the version. Models are trained by"
        )
        print("the scripts under experiments/.")
        return 0 if arguments else 2
    if arguments[0] not in COMMANDS:
        print(f"error: there is no command '{arguments[0]}'; commands are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    sys.argv = [arguments[0], *arguments[1:]]
    runpy.run_module(COMMANDS[arguments[0]][0], run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

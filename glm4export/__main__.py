"""``python -m glm4export``, and the ``glm4export`` command."""

from __future__ import annotations

from typing import NoReturn

from glm4runtime import signals


def main() -> NoReturn:
    """Run the command line in a process of its own. Signals are handled before anything else is imported."""
    signals.install()
    from glm4export import cli

    try:
        status = cli.main(own_process=True)
    except SystemExit as error:  # argparse's
        status = error.code if isinstance(error.code, int) else 0
    signals.leave(status)


if __name__ == "__main__":
    main()

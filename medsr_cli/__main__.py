"""`python -m medsr_cli` and the `medsr` command."""

from __future__ import annotations


def main() -> None:
    """Run the command line; ends the process with the documented exit code."""
    from medsr_cli.cli.app import run

    run()


if __name__ == "__main__":
    main()

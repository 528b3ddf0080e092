"""`saeens` and `python -m saeens_pipeline`: the command line, or the name of the extra that it needs."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line. Without the packages of the extra `pipeline`, say so: exit code 1."""
    try:
        from saeens_pipeline.cli import main as command
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("saeens_models", "saeens_pipeline"):
            raise
        sys.exit(f"error: the package {error.name} is missing. The command saeens needs: pip install 'saeens[pipeline]'")
    command()


if __name__ == "__main__":
    main()

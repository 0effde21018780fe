"""The `telar` command: its verbs, and what becomes of their errors.

Exit codes: 0 ok, 1 failed, 2 usage or configuration, 3 stopped, 4 no cluster answers (130 after Ctrl-C).
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from types import TracebackType

import click

from configs.errors import TelarError
from configs.redaction import redacted
from jobs.verbs import operating, results, running
from jobs.verbs.tasks import tasks


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def cli() -> None:
    """Train and evaluate a transformer on a Ray cluster from one YAML file.

    RUN is a run's name or its URL.
    """


for verb in (*running.VERBS, *results.VERBS, *operating.VERBS, tasks):
    cli.add_command(verb)


def _fail(message: str, exit_code: int) -> int:
    message = redacted(message)
    if "--json" in sys.argv[1:]:
        click.echo(json.dumps({"error": message, "exit_code": exit_code}))
    click.echo(f"error: {message}", err=True)
    return exit_code


def _unexpected(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Last resort for errors that nobody foresaw: one line, and the traceback when TELAR_DEBUG=1 asks for it."""
    if os.environ.get("TELAR_DEBUG") == "1":
        traceback.print_exception(kind, error, trace)
    _fail(f"{kind.__name__}: {error} (a fault in Telar; TELAR_DEBUG=1 shows where)", 1)


def main() -> None:
    """Entry point of the console script."""
    sys.excepthook = _unexpected
    try:
        code = cli.main(prog_name="telar", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.UsageError as error:
        hint = f"; see `{error.ctx.command_path} --help`" if error.ctx else ""
        sys.exit(_fail(error.format_message() + hint, 2))
    except (click.Abort, KeyboardInterrupt):
        sys.exit(_fail("interrupted", 130))
    except TelarError as error:
        if os.environ.get("TELAR_DEBUG") == "1":
            traceback.print_exc()
        sys.exit(_fail(str(error), error.exit_code))


if __name__ == "__main__":
    main()

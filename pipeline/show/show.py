"""The command `blip2 show`: rows of an output in the terminal, in constant memory and without Ray.

A terminal gets a table of its width. A pipe or a file gets one line per row, whole and with tabs between the
columns, so that other programs can read it.
"""

from __future__ import annotations

import shutil
import sys

from pipeline.exit_status import ExitStatus, before_work, errors_to_exit_status
from pipeline.progress import Console, write, write_json
from pipeline.report.rows import FinishedRows, json_line, rows_in
from pipeline.settings.report_settings import ShowSettings
from pipeline.show.choice import check_choice, chosen
from pipeline.show.table import pages, tabbed_lines


@errors_to_exit_status
def show(settings: ShowSettings) -> int:
    """Print the rows that are asked for; stop when nobody reads them any more."""
    with before_work(type(settings)):
        found = FinishedRows.find(settings.output)
        check_choice(found.schema(), settings)
    rows = rows_in(chosen(found.tables(), settings))
    if settings.json:
        written = (write_json(json_line(row)) for row in rows)
    else:
        is_terminal, width = sys.stdout.isatty(), shutil.get_terminal_size().columns
        texts = pages(rows, width) if is_terminal else (f"{line}\n" for line in tabbed_lines(rows))
        written = (write(sys.stdout, text) for text in texts)
    if not all(written):
        return ExitStatus.DONE
    if found.unfinished:
        Console(sys.stderr).say(f"{found.unfinished}; rows of finished shards are shown")
    return ExitStatus.DONE

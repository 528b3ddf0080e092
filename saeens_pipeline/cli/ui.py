"""`saeens ui`."""

from __future__ import annotations

import os
import re
import socket
from typing import Annotated

import typer

from saeens_pipeline.cli.app import app
from saeens_pipeline.cli.output import err, notify, out, print_line
from saeens_pipeline.errors import ConfigurationError, SaeensError, printable
from saeens_pipeline.storage.root import data_root

_LAST_LINES = 20  # of the log, if the UI ends by itself


@app.command()
def ui(
    port: Annotated[int, typer.Option(help="Port on the loopback interface.", min=1, max=65535)] = 3000,
    url: Annotated[str | None, typer.Option(help="Address of a reverse proxy with authentication that serves this UI to others.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Print everything that Dagster tells, and no lines about runs.")] = False,
) -> None:
    """Start the Dagster UI on this machine, with the runs of the command line, and print a line when a run starts or ends.

    Requests of foreign web pages are refused.
    """
    from saeens_pipeline.assets.catalogue import Experiments
    from saeens_pipeline.orchestration.alerts import ADDRESS_VARIABLE
    from saeens_pipeline.orchestration.instance import declare_layers, end_dead_runs, open_instance, prepare_home
    from saeens_pipeline.orchestration.webserver import HOST, in_words, run_servers
    from saeens_pipeline.settings.files import FOLDERS_VARIABLE, own_folders

    _check_url(url)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise SaeensError(f"port {port} on {HOST} cannot be used ({error.strerror}): choose another with --port") from error
    home = prepare_home()
    with open_instance(home) as instance:
        end_dead_runs(instance)
        found = Experiments.load()
        for source in found.sources.values():
            declare_layers(instance, source.name, source.layers)
    for message in found.broken.values():
        notify("left out", message)
    addresses, log = [url] if url else [], None if verbose else home / f"ui_{port}.log"
    out.print(f"The UI answers in about ten seconds at [link]{url or f'http://{HOST}:{port}'}[/link]; Ctrl-C ends it.")
    if log:
        print_line(f"Runs are listed here. What Dagster tells goes to {log}; --verbose prints it.")
    # In DAGSTER_HOME, because Dagster warns of another dagster.yaml in the current folder.
    os.environ["SAEENS_DATA"] = str(data_root())
    os.environ[ADDRESS_VARIABLE] = url or f"http://{HOST}:{port}"
    if folders := own_folders():
        os.environ[FOLDERS_VARIABLE] = os.pathsep.join(map(str, folders))
    os.chdir(home)
    if (code := run_servers(port, addresses, log)) is not None:
        if log and log.exists():
            err.print(
                printable("\n".join(log.read_text(encoding="utf-8", errors="backslashreplace").splitlines()[-_LAST_LINES:])),
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
        where = f", the last of {log}," if log else ""
        raise SaeensError(f"the UI ended by itself {in_words(code)}: the lines above{where} say why")


def _check_url(url: str | None) -> None:
    """Raise ConfigurationError for an address that is not scheme and host, as browsers write it into the Origin header."""
    if url is not None and not re.fullmatch(r"https?://(?:[\w.-]+|\[[\da-fA-F:]+\])(?::\d{1,5})?", url):
        raise ConfigurationError(f"--url {url}: an address without a path is needed, such as https://lab.example.org")

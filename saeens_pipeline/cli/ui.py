"""`saeens ui`."""

from __future__ import annotations

import os
import socket
import sys
from typing import Annotated

import typer

from saeens_pipeline.cli.app import app
from saeens_pipeline.cli.output import out
from saeens_pipeline.errors import SaeensError
from saeens_pipeline.storage.root import data_root


@app.command()
def ui(port: Annotated[int, typer.Option(help="Port on the loopback interface.", min=1, max=65535)] = 3000) -> None:
    """Start the Dagster UI on this machine, with the runs of the command line."""
    from dagster import DagsterInstance

    from saeens_pipeline.assets.catalogue import Experiments
    from saeens_pipeline.orchestration.instance import declare_layers, end_dead_runs, prepare_home
    from saeens_pipeline.settings.files import FOLDERS_VARIABLE, own_folders

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise SaeensError(f"port {port} on 127.0.0.1 cannot be used ({error.strerror}): choose another with --port") from error
    home = prepare_home()
    with DagsterInstance.get() as instance:
        end_dead_runs(instance)
        for source in Experiments.load().sources.values():
            declare_layers(instance, source.name, source.layers)
    out.print(f"The UI answers in about ten seconds at [link]http://127.0.0.1:{port}[/link]; Ctrl-C ends it.")
    # In DAGSTER_HOME, because `dagster dev` warns of another dagster.yaml in the current folder.
    os.environ["SAEENS_DATA"] = str(data_root())
    if folders := own_folders():
        os.environ[FOLDERS_VARIABLE] = os.pathsep.join(map(str, folders))
    os.chdir(home)
    arguments = ["dev", "--workspace", "workspace.yaml", "--host", "127.0.0.1", "--port", str(port)]
    quiet = ["-W", "ignore:Function `dev_command` is superseded"]  # by `dg`, which need not be installed
    os.execv(sys.executable, [sys.executable, *quiet, "-m", "dagster", *arguments])

"""`saeens push` and `saeens pull`."""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from saeens_pipeline.cli.app import app
from saeens_pipeline.cli.output import DictionaryName, grid, notify, out, print_line
from saeens_pipeline.errors import ConfigurationError, counted
from saeens_pipeline.storage.recipes import Store
from saeens_pipeline.storage.root import data_root

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")


@app.command()
def push(
    subject: DictionaryName,
    place: Annotated[str, typer.Argument(metavar="PLACE", help="hub:USER/REPO, with /FOLDER inside it and @BRANCH.")],
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the files and the model card, and send nothing.")] = False,
    license: Annotated[str | None, typer.Option(help="Identifier of a licence on the hub, such as apache-2.0 or cc-by-4.0.")] = None,
    private: Annotated[bool, typer.Option("--private", help="A repository that is created is private.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are in the way, also an edited model card.")] = False,
) -> None:
    """Publish an SAE or an ensemble on the Hugging Face hub, with tables, lineage and model card, in one commit."""
    from rich.filesize import decimal

    from saeens_pipeline.assets.lineage import find_dictionary
    from saeens_pipeline.assets.publication import publication
    from saeens_pipeline.orchestration.catalogue import Catalogue
    from saeens_pipeline.report.model_card import model_card
    from saeens_pipeline.storage import hub_folders

    target = hub_folders.require_target(place)
    if license is not None and not _LICENSE.fullmatch(license):
        raise ConfigurationError(f"--license {license!r}: give the identifier that the hub has, such as apache-2.0, cc-by-4.0 or other")
    store, declarations = Store(data_root()), [output for op in Catalogue.load().all_ops() for output in op.outputs]
    found = find_dictionary(store, declarations, subject)
    with TemporaryDirectory(prefix="saeens-push-") as workspace:
        published = publication(store, declarations, found, Path(workspace))
        card = model_card(published, target, license)
        files = published.with_card(card)
        shown = grid("file", "size")
        shown.columns[1].justify = "right"
        for name, each in files.items():
            shown.add_row(name, decimal(each.size))
        out.print(shown)
        print_line(f"{counted(len(files), 'file')}, {decimal(sum(each.size for each in files.values()))}, to {target}")
        if dry_run:
            print_line(f"\n{card}")
            notify("note", "nothing was sent")
        else:
            message = f"{found.place}, data version {found.artefact.data_version}"
            pushed = hub_folders.push(files, target, str(found.address), message, private=private, overwrite=overwrite)
            if not pushed.is_new:
                notify("note", "the repository has these files already")
            print_line(f"{pushed.url}\n{pushed.place}")
    if license is None:
        notify("note", "the model card states no licence: --license adds one")


@app.command()
def pull(
    place: Annotated[str, typer.Argument(metavar="PLACE", help="hub:USER/REPO, with /FOLDER inside it and @BRANCH, tag or commit.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder that does not exist yet, or is empty.")],
) -> None:
    """Download what `saeens push` published, at one commit, and compare every file with its hash."""
    from saeens_pipeline.storage import hub_folders

    print_line(f"{folder}: {hub_folders.pull(place, folder)}")

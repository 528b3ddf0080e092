"""The pages of `reports/` on the server of the UI, below /reports. They can run their own scripts only, and send no requests."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from saeens_pipeline.storage.names import INDEX_FILE, LEADERBOARD, Address, Partition

REPORTS = "/reports"
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",  # a report is written again under the same address
}
_MISSING = "There is no report here yet. Materialise the report of the experiment, in the UI or with `saeens report EXPERIMENT`.\n"


class ReportPages(StaticFiles):
    """ASGI app: the files of a folder, which need not exist. Links out of it are not followed."""

    def __init__(self, folder: Path) -> None:
        super().__init__(directory=folder, html=True, check_dir=False)
        self.config_checked = True  # or a folder that does not exist yet is an error of the server

    async def get_response(self, path: str, scope: Scope) -> Response:
        if path == "." and (Path(str(self.directory)) / LEADERBOARD / INDEX_FILE).is_file():
            return RedirectResponse(f"{REPORTS}/{LEADERBOARD}/{INDEX_FILE}")
        try:
            response = await super().get_response(path, scope)
        except HTTPException as error:
            if error.status_code != 404:
                raise
            response = PlainTextResponse(_MISSING, 404)
        response.headers.update(_HEADERS)
        return response


def report_url(address: Address, partition: Partition) -> str | None:
    """Return the address of the report that shows an artefact, on the server of the UI; None for what no report of one experiment shows."""
    if address.kind in ("report", "leaderboard"):
        report = address if address.kind == "report" else Address(LEADERBOARD, "report", "report")
    elif address.kind == "source" or partition.layer is None:
        return None
    else:
        report = Address(address.owner, "report", "report")
    return "/" + quote(f"{report.path(Partition(partition.layer))}/{INDEX_FILE}")

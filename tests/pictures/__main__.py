"""``python -m comfyui_dmm.tests.pictures OUT [NAME ...]``: thumbnails of the templates into OUT, all of them or those that are named;
"documents" stands for the pictures of the documents, "help" for those of the nodes' help pages (which lie in web/docs)."""

import sys
import tempfile
from itertools import chain
from pathlib import Path

from comfyui_dmm.training.host_path import find_host

from ..host.templates import TITLES
from .documents import documents, documents_by_host
from .help import help_pictures
from .templates import thumbnails

DOCUMENTS, HELP = "documents", "help"


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    host = find_host()
    if host is None:
        sys.exit("no ComfyUI found: set COMFYUI_PATH to its folder")
    folder, names = (
        Path(sys.argv[1]),
        sys.argv[2:] or [*TITLES, DOCUMENTS, HELP],
    )
    with tempfile.TemporaryDirectory() as base:
        made = []
        if templates := [name for name in names if name not in (DOCUMENTS, HELP)]:
            made.append(thumbnails(host, Path(base) / "templates", folder, templates))
        if DOCUMENTS in names:
            made += [documents(folder), documents_by_host(host, Path(base) / "documents", folder)]
        if HELP in names:
            made.append(help_pictures(host, Path(base) / "help", folder))
        for path in chain(*made):
            print(path, flush=True)


if __name__ == "__main__":
    main()

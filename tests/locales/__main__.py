"""``python -m comfyui_dmm.tests.locales``: writes the files in ``locales/`` anew from ``locales/table.yaml`` and the nodes as ComfyUI
shows them, and ``web/js/words.json`` from ``locales/words.yaml``. Texts that a table lacks, and rows that nothing uses, are named, and
nothing is written."""

import asyncio
import sys
import tempfile
from pathlib import Path

from comfyui_dmm.training.host_path import find_host

from ..host.in_process import import_host
from .files import FOLDER, files, node_infos, texts, write
from .table import missing, read, unused
from .words import FILE, TABLE, words, words_json


def main() -> None:
    host = find_host()
    if host is None:
        sys.exit("no ComfyUI found: set COMFYUI_PATH to its folder")
    with tempfile.TemporaryDirectory() as base:
        import_host(host, Path(base))
        infos = asyncio.run(node_infos())
    table, shown = read(FOLDER / "table.yaml"), texts(infos)
    page, said = read(TABLE), words()
    problems = [*missing(table, shown), *unused(table, shown), *missing(page, said), *unused(page, said)]
    if problems:
        sys.exit("\n".join(problems))
    for path in write(files(infos, table)):
        print(path)
    FILE.write_text(words_json(page), "utf-8")
    print(FILE)


if __name__ == "__main__":
    main()

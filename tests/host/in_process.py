"""ComfyUI imported into this process: its top-level names (``nodes``, ``utils``, ``server``, ...) mean its own files, always.

ComfyUI is started as a script, so its folder is the first of ``sys.path``. A test process cannot promise that: pytest, plugins and
libraries put folders in front at any time, this checkout among them, and its ``nodes`` is another package. So the host's names are
answered before ``sys.path`` is asked; ``sys.path`` itself stays as it is.
"""

import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

TESTS = Path(__file__).resolve().parents[1]


class HostFinder:
    """Finds the host's top-level modules in its folder and nowhere else; to stand first in ``sys.meta_path``."""

    def __init__(self, host: Path):
        self.host, self.names = host, top_level_names(host)

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name not in self.names:
            return None
        spec = PathFinder.find_spec(name, [str(self.host)])
        if spec is not None and spec.loader is None:
            # No __init__.py, as in ``comfy``: Python would search sys.path for more of it whenever that changes. A list is left alone.
            spec.submodule_search_locations = list(spec.submodule_search_locations)
        return spec


def top_level_names(host: Path) -> set[str]:
    """Modules in the host's folder, and folders with modules in it. Not ``tests``: that may be ours, and nothing imports the host's."""
    modules = {path.stem for path in host.glob("*.py")}
    packages = {path.parent.name for path in host.glob("*/*.py")}
    return {name for name in modules | packages if name.isidentifier()} - {"tests"}


def strangers(host: Path) -> dict[str, str]:
    """Imported modules with a name of the host, submodules too, that lie elsewhere: {name: file or folder}. Our tests do not count."""
    names, found = top_level_names(host), {}
    for name, module in list(sys.modules.items()):
        place = origin(module) if name.partition(".")[0] in names else None
        if place is not None and not {host.resolve(), TESTS} & set(place.parents):
            found[name] = str(place)
    return found


def origin(module: ModuleType) -> Path | None:
    """The file of a module, or the folder of a package without ``__init__.py``; None for a module made without any."""
    path = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", ())), None)
    return Path(path).resolve() if path else None


def claim_names(host: Path) -> None:
    """From now on the host's names mean the host's modules in this process.

    Raises RuntimeError when one of them was imported before: whoever did that keeps the module that it got.
    """
    finder = HostFinder(host.absolute())
    # In a checkout whose folder is called ``nodes`` or ``comfy``, pytest imports this pack by that name, as the parent of the tests.
    # They are imported already and do not need it again.
    checkout = __name__.partition(".")[0]
    if checkout in finder.names:
        del sys.modules[checkout]
    early = {name: str(origin(sys.modules[name])) for name in sorted(finder.names & sys.modules.keys())}
    if early:
        raise RuntimeError(f"imported before the host of the tests in {host}: {early}")
    sys.meta_path.insert(0, finder)


def import_host(host: Path, base: Path) -> ModuleType:
    """The host's ``comfy`` package, imported into this process on the CPU, with ``base`` as its folder for models, input and output.

    Raises RuntimeError as ``claim_names``.
    """
    claim_names(host)
    from comfy.cli_args import args

    args.cpu = True
    args.base_directory = str(base)
    import comfy.sd
    import folder_paths
    from comfyui_dmm.nodes import paths

    for name in ("dmm", "checkpoints", "loras"):
        Path(folder_paths.models_dir, name).mkdir(parents=True)
    paths.register()
    return comfy
